"""A person's own settings, in a home that a test has made below its folder."""

from __future__ import annotations

from pathlib import Path


def home(tmp_path: Path) -> dict[str, str | None]:
    """Variables of a run."""
    return {"XDG_CONFIG_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path / "home")}


def user_file(tmp_path: Path) -> Path:
    return tmp_path / "xdg" / "dsv2" / "config.toml"


def put(tmp_path: Path, text: str) -> Path:
    path = user_file(tmp_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
