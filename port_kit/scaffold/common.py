"""Values that the templates of all ports have in common."""

from __future__ import annotations

import port_kit
from port_kit.inspect.known_classes import library_version
from port_kit.scaffold.render import literal
from port_kit.scaffold.request import NewPort
from port_kit.scaffold.source import Source


def common_values(port: NewPort, source: Source, parameters: int = 0) -> dict[str, str]:
    """Return the names of a port, and facts of its source.

    Args:
        port: the request.
        source: of the transformer.
        parameters: of the transformer; 0 if they were not counted.
    """
    licence = source.licence or "see the repository's card"
    packages = [port.name] if port.path == "diffusers" else [port.name, f"{port.name}.model"]
    return {
        "name": port.name,
        "prefix": port.prefix,
        "title": port.name.replace("_", " "),
        "distribution": port.name.replace("_", "-"),
        "pipeline_class": port.pipeline_class,
        "packages": literal(packages),
        "kit_version": port_kit.__version__,
        "diffusers_version": library_version("diffusers").partition(" ")[2],
        "repository": source.repository,
        "revision": f'"{source.revision}"' if source.revision else "None",
        "licence": literal(licence),
        "licence_text": licence,
        "weights_from": f"`{source.repository}`" + (f" at `{source.revision}`" if source.revision else ""),
        "transformer_size": f"{parameters / 1e9:.2f} B parameters" if parameters else "not measured",
    }


def media_values(*, takes_image: bool) -> dict[str, str]:
    """Return the reference image of the test of the engine, or nothing."""
    return {
        "media_import": "\nfrom PIL import Image" if takes_image else "",
        "media_options": ', "--image", str(picture(tmp_path))' if takes_image else "",
        "media_helper": _PICTURE if takes_image else "",
    }


_PICTURE = '''

def picture(folder: Path) -> Path:
    """Write a reference image."""
    path = folder / "reference.png"
    Image.new("RGB", (96, 64), (200, 30, 90)).save(path)
    return path
'''
