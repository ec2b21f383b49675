"""The server of `raas-cache serve`: transformers' server over the rows of one model."""

from .app import build_app, server_of


__all__ = ["build_app", "server_of"]
