"""``python -m benchmarks.peers.install``: the peers, none of which may replace our torch.

Those that run on torch go into this environment without what they ask for (``torch.txt`` and ``kronfluence.txt`` list it
pinned); each of the others gets an environment of its own under ``benchmarks/.peers``, made again when its list has
changed. A peer that cannot be had is reported and left out: its rows say so.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent / ".peers"


def python_of(peer: str) -> Path:
    """The Python of a peer's own environment, whether it is there or not.

    >>> python_of("neural_tangents").parts[-4:]
    ('.peers', 'neural_tangents', 'bin', 'python')
    """
    return ENVIRONMENTS / peer / "bin" / "python"


def is_ready(peer: str) -> bool:
    """True where the environment was made, whole, from the list as it is now."""
    stamp = ENVIRONMENTS / peer / ".complete"
    wanted = (HERE / f"{peer}.txt").read_text(encoding="utf-8")
    return python_of(peer).exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted


def make_environment(peer: str) -> None:
    """An environment with exactly what ``<peer>.txt`` lists."""
    if is_ready(peer):
        return
    wanted = HERE / f"{peer}.txt"
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENTS / peer)], check=True)
    install(python_of(peer), wanted)
    (ENVIRONMENTS / peer).mkdir(parents=True, exist_ok=True)
    (ENVIRONMENTS / peer / ".complete").write_text(wanted.read_text(encoding="utf-8"), encoding="utf-8")


def install(python: Path, wanted: Path) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--requirement", str(wanted)], check=True)


def main() -> int:
    """Install what can be had; 0 also where a peer could not."""
    steps = {
        "the peers on torch": lambda: install(Path(sys.executable), HERE / "torch.txt"),
        "kronfluence": lambda: install(Path(sys.executable), HERE / "kronfluence.txt"),
        "neural-tangents": lambda: make_environment("neural_tangents"),
    }
    for name, step in steps.items():
        try:
            step()
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"benchmarks: {name} could not be installed ({error}); the tables will say so", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
