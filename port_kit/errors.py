"""Exceptions of the kit.

::

    PortKitError                      .code  .hint  .details
      + PortNotFoundError             no port of that name
      + OptionalDependencyError       a part that is not installed (also an ImportError)
      + DownloadError                 recipe, plan, fetch, verify, convert, git code, assemble, lock
      + CheckpointError               a checkpoint file that cannot be read, or that would execute code
      + RemapError                    rules, manifests, coverage, loading (also a ValueError)
      + ParallelError                 degrees, plans, equivalence (also a ValueError)
      + ConfigError                   a component's configuration that no module can be built from (also a ValueError)
      + ParityError                   goldens that cannot be read or run
      + RegistrationError             vLLM-Omni did not take the plugin, or has changed under it
      + InspectError                  what is to be inspected is no model
      + ScaffoldError                 a port that cannot be written
      + InputError                    a request that no port can serve (also a ValueError)

A message says what was given and what is required; ``hint`` says what to do. ``code`` is one of :data:`CODES`,
stable across releases, and is what ``--json`` prints and what the troubleshooting page is ordered by.
"""

from __future__ import annotations

from port_kit.escape import escape_control_chars

#: Every code that is raised, with the one line that the troubleshooting page prints for it.
CODES: dict[str, str] = {
    "port_not_found": "no shipped, installed or PORT_KIT_PATH port has this name",
    "port_invalid": "a port's declaration cannot be read or is incomplete",
    "port_broken": "a port's package cannot be imported",
    "port_clash": "two ports share a name, a pipeline class or a package name",
    "port_path": "PORT_KIT_PATH names something that holds no port",
    "dependency_missing": "an optional part is not installed",
    "recipe_invalid": "a recipe lacks a field, has one too many, or a value that cannot be right",
    "config_invalid": "a component's configuration is incomplete, contradictory or not supported",
    "latent_size": "video latents do not divide into patches",
    "text_length": "a text has more tokens than the model was made for",
    "block_index": "a layer is named that the model does not have",
    "reference_length": "references do not fit into the sequence, or the model has none",
    "parallel_degree": "a degree of parallelism is impossible for this model, or in this combination",
    "parallel_device": "ranks were to run on a device that the vLLM of this environment is not built for",
    "parallel_subject": "a port has nothing small that could be run on several ranks",
    "parallel_table": "a table of parallel linears names what is no linear",
    "parallel_world": "a process of one rank was needed and this process belongs to a larger world",
    "network": "a request failed as often as it may",
    "proxy": "a proxy cannot be used, or refuses",
    "server_busy": "the server asks for a longer wait than is granted",
    "hub_endpoint": "the endpoint does not answer like a Hub",
    "hub_file_missing": "a repository lacks a file at that revision",
    "hub_foreign_link": "a mirror sends the client to another host for the list of files",
    "hub_gated": "a repository's terms have not been accepted, or no token was sent",
    "hub_refused": "the Hub refuses a request",
    "hub_repo_missing": "a repository does not exist, or may not be seen",
    "hub_revision_missing": "a repository has no such revision",
    "hub_token_invalid": "the Hub does not accept the token",
    "hub_token_missing": "a repository does not exist or needs a token, and none was sent",
    "disk_full": "the disk has not enough space",
    "file_too_large": "the disk, or a limit of this shell, takes no file of that size",
    "output_dir": "the output directory cannot be used",
    "file_access": "a file outside the output directory cannot be used",
    "path_unsafe": "a file's path could leave the model directory or cannot be stored",
    "source_missing": "a file that was named does not exist",
    "hash_mismatch": "a file's content is not what its repository or the recipe states",
    "lock_invalid": "port.lock cannot be read",
    "pattern_empty": "a recipe's pattern matches no file",
    "target_collision": "two files of a recipe go to one place",
    "target_foreign": "a file that port-kit did not put there is in the way",
    "offline_incomplete": "something is missing and the network may not be used",
    "model_incomplete": "a model directory is damaged or not whole",
    "interrupted": "a download was told to stop",
    "convert_layout": "a remote checkpoint is laid out unusually and cannot be converted on the way",
    "code_broken": "git code could not be fetched, is changed, or does not import",
    "code_clash": "a module of git code would hide or be hidden by another one",
    "code_url": "a git URL is not one that is fetched from",
    "install_target": "this environment's site-packages cannot be written",
    "checkpoint_format": "a file is of a format that is not read (an error page, an LFS pointer, GGUF, ONNX, ...)",
    "checkpoint_corrupt": "a safetensors or GGUF file is cut short, damaged, or contradicts its header",
    "checkpoint_unreadable": "the system cannot read a checkpoint's file, or not to its end",
    "scaffold_name": "a new port's name is no module's name, is taken, or would mislead vLLM-Omni",
    "scaffold_target": "the folder for a new port cannot be used",
    "scaffold_unsupported": "a model cannot be adapted; what stands in the way is listed",
    "inspect_target": "what was to be inspected is neither a folder nor a repository",
    "inspect_empty": "what was to be inspected holds no weights and no configuration of a model",
    "pickle_drop": "a value that is to be left out is not in the checkpoint",
    "pickle_corrupt": "a torch checkpoint is cut short or damaged",
    "pickle_unsafe": "a pickle asks for more than tensors; nothing was executed",
    "pickle_unsupported": "a torch checkpoint holds something that has no plain form in safetensors",
    "pickle_wrapper": "the tensors lie under other keys of the pickle than was said",
    "manifest_invalid": "a manifest, or the checkpoint it is read from, cannot be read",
    "remap_ambiguous": "two rules match one source tensor",
    "remap_beyond_layers": "a rule sends a layer to a number that the module does not have",
    "remap_collision": "two source tensors are sent to the same target",
    "remap_dead_rule": "a rule matches nothing, or what it drops or keeps does not exist",
    "remap_dtype": "a value would lose precision or kind on its way, and no rule says that it may",
    "remap_failed": "several kinds of gaps at once: see the problems",
    "remap_incomplete_group": "a fused tensor did not get all of its parts",
    "remap_missing": "a target tensor is not written by any source",
    "remap_interop": "an entry of another library's mapping that rules cannot express, or the reverse",
    "remap_mixed": "original and already converted names in one checkpoint",
    "remap_op": "an op does not exist, has wrong arguments, or has no inverse",
    "remap_overlap": "two copy tasks write, or use, the same elements",
    "remap_overflow": "a finite value became infinite in a narrower dtype",
    "remap_pattern": "a source pattern is not a regular expression, or could take unbounded time",
    "remap_rules": "a rule set cannot be read, or contradicts itself",
    "remap_shape": "a source tensor does not fit its target",
    "remap_size": "a size expression is malformed or names an unknown size",
    "remap_slot": "a target has no such shard",
    "remap_template": "a target template is malformed or names a group that its pattern lacks",
    "remap_tensor": "a stream has a sparse tensor, or one without values",
    "remap_unexpected": "a source tensor has no rule, or its rule leads to no target",
    "remap_unused": "part of a source tensor is neither used nor dropped with a reason",
    "parity_no_cases": "a port has no golden cases, or none matches",
    "goldens_invalid": "a goldens folder is incomplete or unreadable",
    "reference_missing": "a port's original code is not declared, or not fetched",
    "reference_python": "the interpreter for the original code cannot be started",
    "reference_failed": "the original code stopped with an error",
    "reference_timeout": "the original code did not finish in time",
    "reference_output": "what the original code left is not a goldens folder, or a folder is in the way",
    "parity_shape": "a port's tensor and the reference's have different shapes",
    "input_missing": "a request lacks its prompt, its reference pictures or its reference voices",
    "input_count": "a request's reference pictures and voices do not pair up, or are too many",
    "input_size": "a request's picture or video size cannot be made",
    "engine_option": "an engine option that the model or this platform cannot have, or not together with another",
    "lora_file": "a LoRA file that cannot be read, or that holds what is not supported",
    "input_value": "a request's parameter is out of range or misspelt",
    "input_type": "a request's parameter has the wrong type",
    "input_too_long": "a request's prompt is longer than the text encoder reads",
    "input_too_short": "a reference voice is shorter than the part of it that is used",
    "input_unreadable": "a reference picture or voice cannot be decoded",
    "cache_passes": "cache_dit needs ranks that run equal numbers of guidance passes",
    "media_write": "a video file could not be written or measured",
    "sampling_invalid": "a solver, a number of steps or a shift that cannot be sampled with",
    "component_config": "a component's config.json lacks a key or asks for what the component does not do",
    "component_input": "a tensor handed to a component has a shape that it cannot take",
    "attention_backend": "an attention backend was asked for that the CPU platform cannot run",
    "port_unregistrable": "a port's pipeline cannot be handed to vLLM-Omni's registry",
    "upstream_changed": "vLLM-Omni or torch changed where a patch of the kit rests on it",
    "vllm_omni_version": "the installed vLLM-Omni is not of the series that the kit was proven on",
    "worker_died": "a forked test worker died before it had a result",
    "worker_failed": "a forked test worker raised; its traceback is in the message",
    "worker_fork": "test workers were to be forked from inside a torch.distributed world",
    "worker_timeout": "forked test workers did not finish in time",
    "outline_invalid": "an outline of a checkpoint names a tensor twice, or a tiny model lacks a part",
}


class PortKitError(Exception):
    """Base of all errors of the kit.

    Args:
        message: what was given and what is required, without a final full stop; control characters are escaped.
        code: a key of :data:`CODES`.
        hint: what to do about it; one sentence, may name a command.
        details: facts for ``--json`` (names, files, sizes); values must be JSON-serializable.
    """

    default_code: str | None = None

    def __init__(self, message: str, *, code: str | None = None, hint: str = "", **details: object) -> None:
        code = code or self.default_code
        if code not in CODES:
            raise KeyError(f"error code {code!r} is not registered in port_kit.errors.CODES")
        message = escape_control_chars(message, keep="\n\t")
        super().__init__(message)
        self.message = message
        self.code: str = code
        self.hint = hint
        self.details = details

    def __reduce__(self) -> tuple[object, ...]:
        """Errors cross process borders (workers, pools): rebuild them with all their parts."""
        return (_rebuild, (type(self), self.message, self.code, self.hint, self.details))

    def __str__(self) -> str:
        """All of it: other programs pass on nothing but an error's text."""
        told = f"[{self.code}] {self.message}"
        return f"{told}\nhint: {self.hint}" if self.hint else told


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


class CheckpointError(PortKitError):
    """A checkpoint file is damaged, of another format, or asks for more than tensors. Nothing of it was executed."""


class RemapError(PortKitError, ValueError):
    """A rule set is invalid, or does not map a checkpoint completely onto its modules."""


class ParallelError(PortKitError, ValueError):
    """A parallel layout is impossible, or N ranks do not compute what one rank computes."""


class ConfigError(PortKitError, ValueError):
    """A component's configuration is incomplete, contradicts itself, or asks for what the model does not have."""

    default_code = "config_invalid"


class ParityError(PortKitError):
    """Goldens are missing, unreadable or unsupported by this port."""


class RegistrationError(PortKitError):
    """vLLM-Omni did not take the kit's registration, or changed what the kit relies on."""


class InspectError(PortKitError):
    """The target of an inspection is neither a folder nor a repository, or has no model."""

    default_code = "inspect_target"


class ScaffoldError(PortKitError):
    """A port cannot be written: its name, its folder, or the model that it was to be adapted from."""


class InputError(PortKitError, ValueError):
    """A request that cannot be served: its references, sizes, counts, prompts or parameters."""
