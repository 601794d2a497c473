"""What files hold, and what is wrong with them."""

from pathlib import Path

from core.doctor import examined, of_file, report, versions


def doctor(arguments):
    """Look at files of concepts and domains, or at all in a folder, and print a report to paste."""
    sections = {"Versions": examined(versions)}
    for given in map(Path, arguments.files):
        for path in sorted(given.rglob("*.safetensors")) if given.is_dir() else [given]:
            sections[str(path)] = examined(of_file, path)
    print(report(sections), end="")
