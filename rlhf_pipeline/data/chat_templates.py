"""Finds chat templates: those that come with the package, and files."""

from __future__ import annotations

from pathlib import Path

from rlhf_pipeline.errors import UserError


def load_template(name_or_path: str, conf_dir: Path) -> str:
    """The Jinja text of a template: a file, or the name of one under `conf_dir`/templates."""
    shipped = conf_dir / "templates"
    for path in (Path(name_or_path).expanduser(), shipped / f"{name_or_path}.jinja"):
        try:
            if path.is_file():
                return path.read_text(encoding="utf-8")
        except OSError as error:  # a name too long, no permission
            raise UserError(f"chat template {name_or_path[:200]}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"chat template {path}: not UTF-8 ({error}); save it as UTF-8") from error
    known = ", ".join(sorted(path.stem for path in shipped.glob("*.jinja")))
    raise UserError(f"no chat template {name_or_path!r}: no such file, and the shipped ones are {known}")
