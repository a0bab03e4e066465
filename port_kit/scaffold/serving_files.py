"""Scripts that serve a port and request its output, and its recipe: commands per machine."""

from __future__ import annotations

from collections.abc import Sequence

from port_kit.parallel.layout import CONFIG_NAMES, Layout
from port_kit.scaffold.modality import FORMS
from port_kit.upstream.series import REQUIREMENT

#: Endpoint of ports that change an image.
_EDITS = "/v1/images/edits"


def serving_templates(output: str, *, takes_image: bool = False) -> dict[str, str]:
    """Return the templates by the paths of the files.

    Args:
        output: one of :data:`port_kit.scaffold.modality.MODALITIES`.
        takes_image: True if requests have a reference image.
    """
    job = ["curl_video.sh"] if output == "video" else []
    return {name: f"common/{name}" for name in ("RECIPE.md", "run_server.sh", _script(output, takes_image), *job)}


def serving_values(output: str, layouts: Sequence[str], *, takes_image: bool = False) -> dict[str, str]:
    """Return the fields of the templates.

    Args:
        output: as for :func:`serving_templates`.
        layouts: that the tests of the port compare with one rank.
        takes_image: as for :func:`serving_templates`.
    """
    return {
        "task": f"{_source(takes_image)}-to-{output}",
        "endpoint": _EDITS if takes_image and output == "image" else FORMS[output].endpoint,
        "curl_command": f"{_script(output, takes_image)} {'image.png ' if takes_image else ''}"
        f'"{FORMS[output].example_prompt}" out.{FORMS[output].suffix}',
        "omni": REQUIREMENT,
        "layout_commands": "\n".join(_command(layout) for layout in layouts),
    }


def _source(takes_image: bool) -> str:
    return "image" if takes_image else "text"


def _script(output: str, takes_image: bool) -> str:
    return f"run_curl_{_source(takes_image)}_to_{output}.sh"


def _command(layout: str) -> str:
    """Return the command that serves the model in a layout."""
    degrees = Layout.parse(layout)
    given = {name: getattr(degrees, kind) for kind, name in CONFIG_NAMES.items() if getattr(degrees, kind) > 1}
    options = [f"--{name.replace('_', '-')} {degree}" for name, degree in given.items()]
    return f"    ./run_server.sh MODEL {' '.join(options)}"
