"""The commands of `raas-cache` that belong to no other folder. No other folder may import this folder."""

from raas_cache_cli import app as app
