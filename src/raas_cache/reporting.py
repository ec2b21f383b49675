"""Tables and figures that `bench` and `eval` both write."""


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A GitHub-Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))
