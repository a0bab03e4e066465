"""Every exception of the kit, one tree.

::

    PortKitError                      .code  .hint  .details
      + PortNotFoundError             no port of that name
      + OptionalDependencyError       a part that is not installed (also an ImportError)
      + DownloadError                 recipe, plan, fetch, verify, convert, git code, assemble, lock
      + RemapError                    rules, manifests, coverage, loading (also a ValueError)
      + ParallelError                 degrees, plans, equivalence (also a ValueError)
      + ParityError                   goldens that cannot be read or run
      + RegistrationError             vLLM-Omni did not take the plugin, or has changed under it
      + InputError                    a request that no port can serve (also a ValueError)

A message says what was given and what is required; ``hint`` says what to do. ``code`` is one of :data:`CODES`,
stable across releases, and is what ``--json`` prints and what the troubleshooting page is ordered by.
"""

from __future__ import annotations

#: Every code that is raised, with the one line that the troubleshooting page prints for it.
CODES: dict[str, str] = {
    "port_not_found": "no shipped, installed or PORT_KIT_PATH port has this name",
    "port_invalid": "a port's declaration cannot be read or is incomplete",
    "dependency_missing": "an optional part is not installed",
    "recipe_invalid": "a recipe lacks a field, has one too many, or a value that cannot be right",
    "parallel_world": "a process of one rank was needed and this process belongs to a larger world",
    "parity_no_cases": "a port has no golden cases, or none matches",
    "goldens_invalid": "a goldens folder is incomplete or unreadable",
    "parity_shape": "a port's tensor and the reference's have different shapes",
    "attention_backend": "an attention backend was asked for that the CPU platform cannot run",
    "port_unregistrable": "a port's pipeline cannot be handed to vLLM-Omni's registry",
    "upstream_changed": "vLLM-Omni, torch or torchvision changed where a patch of the kit rests on it",
    "vllm_omni_version": "the installed vLLM-Omni is not of the series that the kit was proven on",
}


class PortKitError(Exception):
    """Base of all errors of the kit.

    Args:
        message: what was given and what is required, without a final full stop.
        code: a key of :data:`CODES`.
        hint: what to do about it; one sentence, may name a command.
        details: facts for ``--json`` (names, files, sizes); values must be JSON-serialisable.
    """

    default_code: str | None = None

    def __init__(self, message: str, *, code: str | None = None, hint: str = "", **details: object) -> None:
        code = code or self.default_code
        if code not in CODES:
            raise KeyError(f"error code {code!r} is not registered in port_kit.errors.CODES")
        super().__init__(message)
        self.message = message
        self.code: str = code
        self.hint = hint
        self.details = details

    def __reduce__(self) -> tuple[object, ...]:
        """Errors cross process borders (workers, pools): rebuild them with all their parts."""
        return (_rebuild, (type(self), self.message, self.code, self.hint, self.details))

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


def _rebuild(cls: type[PortKitError], message: str, code: str, hint: str, details: dict[str, object]) -> PortKitError:
    return cls(message, code=code, hint=hint, **details)


class PortNotFoundError(PortKitError):
    """No port has the given name. ``details["known"]`` lists the names that exist."""

    default_code = "port_not_found"


class OptionalDependencyError(PortKitError, ImportError):
    """A part of the kit needs a package that is not installed; the hint is the command that installs it."""

    default_code = "dependency_missing"


class DownloadError(PortKitError):
    """Planning, fetching, verifying, converting or assembling a model directory failed."""


class RemapError(PortKitError, ValueError):
    """A rule set is invalid, or does not map a checkpoint completely onto its modules."""


class ParallelError(PortKitError, ValueError):
    """A parallel layout is impossible, or N ranks do not compute what one rank computes."""


class ParityError(PortKitError):
    """Reference goldens are missing, unreadable or cannot be run by this port."""


class RegistrationError(PortKitError):
    """vLLM-Omni did not take the kit's registration, or changed what the kit relies on."""


class InputError(PortKitError, ValueError):
    """A request that cannot be served: its references, sizes, counts, prompts or parameters."""
