"""What a pipeline returns, and the files that it becomes."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xdit_ir.errors import GenerationError

FPS = 16


def results(output: Any) -> list[Any]:
    """The images (`PIL.Image`) and videos (lists of them) of a pipeline's output: its first field.

    Raises:
        GenerationError: it is something else.
    """
    from PIL.Image import Image

    first = next(iter(output.values())) if isinstance(output, Mapping) else output
    first = first[0] if isinstance(first, tuple) else first
    items = first if isinstance(first, list) else [first]
    frames = [frame for item in items for frame in (item if isinstance(item, list) else [item])]
    if not frames or not all(isinstance(frame, Image) for frame in frames):
        kinds = sorted({type(frame).__name__ for frame in frames})
        raise GenerationError(f"the pipeline returned {', '.join(kinds) or 'nothing'}, expected images or videos")
    return items


def check_writable(folder: Path) -> None:
    """Raise `GenerationError` unless files can be made in a folder, which need not be there; leaves nothing behind."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
    except (OSError, ValueError) as error:
        raise GenerationError(f"output {folder} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            for path in made:
                path.rmdir()


def write(items: list[Any], folder: Path, place: int, fps: int = FPS) -> list[Path]:
    """Write the results of the prompt at `place`: png, and mp4, or gif where nothing can write mp4."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, item in enumerate(items):
        stem = f"{place:04d}" if len(items) == 1 else f"{place:04d}-{number}"
        if isinstance(item, list):
            made.append(_video(item, folder / stem, fps))
        else:
            made.append(folder / f"{stem}.png")
            item.save(made[-1])
    return made


def writes_mp4() -> bool:
    """Whether diffusers finds what it writes videos with."""
    found = {name: importlib.util.find_spec(name) is not None for name in ("imageio", "imageio_ffmpeg", "cv2")}
    return (found["imageio"] and found["imageio_ffmpeg"]) or (found["cv2"] and not found["imageio"])


def _video(frames: list[Any], stem: Path, fps: int) -> Path:
    if writes_mp4():
        import diffusers.utils

        path = stem.with_suffix(".mp4")
        # The default would scale sizes that are no multiples of 16.
        diffusers.utils.export_to_video(frames, str(path), fps=fps, macro_block_size=1)
        return path
    path = stem.with_suffix(".gif")
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    return path
