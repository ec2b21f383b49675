"""Open an HTML page in a headless browser, and read from it what the browser has made of it."""

import json
import re
import shutil
import socketserver
import subprocess
import threading
from contextlib import contextmanager
from html import escape, unescape


NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
OPTIONS = (
    "--headless", "--hide-scrollbars", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
    "--virtual-time-budget=10000",
)  # fmt: skip


@contextmanager
def proxy():
    """A proxy that answers nothing. Yields its address and a list that gets the first line of every request."""
    requests = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            requests.append(self.rfile.readline().decode())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", requests
        server.shutdown()


def opened(page, script, folder, width=1280, dark=False):
    """Open a page in a frame with this width in pixels.

    Args:
        script: body of a JavaScript function of `page` (the document) and `window` (its window) that returns JSON.
        dark: whether the reader prefers dark pages.

    Returns:
        What the script returned, and the requests that the browser sent to the network.
    """
    path = folder / "frame.html"
    path.write_text(
        f"""<meta name="color-scheme" content="light dark"><pre></pre>
<iframe style="border: 0; height: 3000px; width: {width}px" srcdoc="{escape(page)}"></iframe><script>
const frame = document.querySelector("iframe");
const script = (page, window) => {{ {script} }};
frame.onload = () => {{
  document.querySelector("pre").textContent = JSON.stringify(script(frame.contentDocument, frame.contentWindow));
}};
</script>"""
    )
    with proxy() as (address, requests):
        found = subprocess.run(
            [
                BROWSER, *OPTIONS, f"--user-data-dir={folder / 'profile'}", f"--proxy-server={address}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", path.as_uri(),
            ],
            capture_output=True, text=True, timeout=100, check=True,
        )  # fmt: skip
        return json.loads(unescape(re.search("<pre>(.*?)</pre>", found.stdout, re.DOTALL)[1])), requests
