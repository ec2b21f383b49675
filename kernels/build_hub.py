"""Builds the Hugging Face Hub kernel of `raas_kernels` into a folder: `python kernels/build_hub.py build/hub`.

The folder holds the files of a kernel repository on the Hub:

    README.md                                 the card, CARD.md here
    LICENSE
    build/torch-universal/                    the package's files, unchanged: Python only, for every torch and device
    build/torch-universal/metadata.json       the kernel's name, id and version, and the SHA-256 of each file

`kernels.get_local_kernel` loads it from there. Upload it with the Hub's own tools.
"""

import argparse
import base64
import hashlib
import json
import shutil
from pathlib import Path


HERE = Path(__file__).parent
NAME = "raas-kernels"
VERSION = 2  # the version in `get_kernel(..., version=2)`; raise it when a call of a public function would break
VARIANT = Path("build", "torch-universal")


def build(target: Path) -> None:
    """Write the kernel repository to `target`: a new or empty folder, or an earlier build, whose files are replaced.

    Raises:
        FileExistsError: `target` is something else.
    """
    variant = target / VARIANT
    if target.exists() and not _is_replaceable(target):
        raise FileExistsError(
            f"target {str(target)!r} is neither an empty folder nor an earlier build of {NAME}, and was left as it is: "
            "name a folder that does not exist yet."
        )
    if variant.exists():
        shutil.rmtree(variant)
    shutil.copytree(HERE / "raas_kernels", variant, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(HERE / "CARD.md", target / "README.md")
    shutil.copyfile(HERE.parent / "LICENSE", target / "LICENSE")
    (variant / "metadata.json").write_text(json.dumps(metadata(variant), indent=2) + "\n")


def metadata(variant: Path) -> dict:
    """The contents of metadata.json, as the package `kernels` reads them.

    The id names the loaded module and the namespace of its operators. It is a hash of the files, so that two versions
    in one process are two modules, and two builds of the same files are equal.
    """
    digests = {
        path.relative_to(variant).as_posix(): hashlib.sha256(path.read_bytes()).digest()
        for path in sorted(variant.rglob("*"))
        if path.is_file()
    }
    content = hashlib.sha256(b"".join(name.encode() + digest for name, digest in digests.items()))
    return {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_{content.hexdigest()[:8]}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},  # the format wants one; a universal variant loads on every backend
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }


def _is_replaceable(target: Path) -> bool:
    if not target.is_dir():
        return False
    if not any(target.iterdir()):
        return True
    try:
        described = json.loads((target / VARIANT / "metadata.json").read_bytes())
    except (OSError, ValueError, RecursionError):  # missing or damaged
        return False
    return isinstance(described, dict) and described.get("name") == NAME


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="a new or empty folder, or an earlier build")
    args = parser.parse_args()
    try:
        build(args.target)
    except FileExistsError as error:
        parser.error(str(error))
    print(f"{NAME} is in {args.target}: kernels.get_local_kernel(Path({str(args.target)!r})) loads it.")


if __name__ == "__main__":
    main()
