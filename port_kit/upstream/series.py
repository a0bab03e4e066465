"""Supported release series of vLLM-Omni, and the installed one."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

from port_kit.errors import RegistrationError

#: Release series that the kit is tested with, oldest first.
SERIES = ("0.30", "0.32")

#: Requirement for pip with the same meaning.
REQUIREMENT = "vllm-omni>=0.30,<0.33,!=0.31.*"


def series_of(release: str) -> str | None:
    """Return the supported series of a release, such as ``0.32`` for ``0.32.0rc1``, or None."""
    return next((series for series in SERIES if release.startswith(f"{series}.")), None)


def check_version() -> str:
    """Return the series of the installed vLLM-Omni.

    Raises:
        RegistrationError: ``vllm_omni_version``; the series is not supported.
    """
    release = version("vllm-omni")
    if (series := series_of(release)) is None:
        raise RegistrationError(
            f"vLLM-Omni: expected version {' or '.join(f'{known}.x' for known in SERIES)}, got {release}.",
            code="vllm_omni_version",
            hint=f"pip install '{REQUIREMENT}', or install a port-kit for {release}",
            found=release,
        )
    return series


@cache
def installed_series() -> str:
    """Return the series of the installed vLLM-Omni; as :func:`check_version`, once per process."""
    return check_version()
