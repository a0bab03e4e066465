"""Exceptions of the kit.

::

    PortKitError                      .code  .hint  .details
      + PortNotFoundError             no port of that name
      + OptionalDependencyError       an optional package is not installed (also an ImportError)
      + DownloadError                 recipe, plan, fetch, verify, convert, git code, assemble, lock
      + CheckpointError               a checkpoint file is invalid, or would execute code
      + RemapError                    rules, manifests, coverage, loading (also a ValueError)
      + ParallelError                 degrees, plans, equivalence (also a ValueError)
      + ConfigError                   a component's configuration is invalid (also a ValueError)
      + ParityError                   goldens cannot be read or run
      + RegistrationError             registration in vLLM-Omni failed, or vLLM-Omni has changed
      + InspectError                  the target of an inspection is not a model
      + ScaffoldError                 a port cannot be written
      + InputError                    a request cannot be served (also a ValueError)

A message states the found and the expected value; ``hint`` states a remedy. ``code`` is one of :data:`CODES`. Codes are
stable across releases; ``--json`` prints them, and the troubleshooting page is ordered by them.
"""

from __future__ import annotations

from port_kit.escape import escape_control_chars, quoted

#: All codes, with their line on the troubleshooting page.
CODES: dict[str, str] = {
    "port_not_found": "no shipped, installed or PORT_KIT_PATH port has this name",
    "port_unfinished": "a part of a new port has not been written yet",
    "port_invalid": "a port's declaration cannot be read or is incomplete",
    "port_broken": "a port's package cannot be imported",
    "port_clash": "two ports share a name, a pipeline class or a package name",
    "port_path": "PORT_KIT_PATH names a path without a port",
    "dependency_missing": "an optional package is not installed",
    "recipe_invalid": "a recipe lacks a field, has an unknown field or an invalid value",
    "config_invalid": "a component's configuration is incomplete, contradictory or not supported",
    "latent_size": "video latents do not divide into patches",
    "text_length": "a text has more tokens than the model supports",
    "block_index": "the index of a layer is out of range",
    "reference_length": "references do not fit into the sequence, or the model does not support them",
    "parallel_degree": "a degree of parallelism is not supported by this model, or in this combination",
    "parallel_conv": "a convolution over tokens has a kernel or channels that cannot be split",
    "parallel_device": "the installed vLLM is not built for the device of the ranks",
    "parallel_subject": "a port has no tiny model to run on several ranks",
    "parallel_table": "a table of parallel linears names a module that is not a linear",
    "parallel_tokens": "a tensor has other tokens than this rank's part of its sequence",
    "parallel_world": "a single-rank process is required, and this process belongs to a larger world",
    "plan_cache": "a plan has no pattern for Cache-DiT, or a configuration of the cache does not fit its lists",
    "plan_degree": "the number of ranks does not divide what a plan splits",
    "plan_expression": "a size of a plan cannot be computed for a module",
    "plan_file": "a plan file cannot be read, or is not a plan",
    "plan_inference": "no plan can be inferred for a module; the finding is in the message",
    "plan_layout": "a plan does not prove the layout of an engine, or is for another class",
    "plan_pattern": "a pattern of a plan matches no module",
    "plan_refused": "a module cannot have a kind of parallelism; the finding is in the message",
    "plan_replace": "a hand-written module does not fit in place of the adapted one",
    "plan_stale": "the source of a class has changed since its plan was inferred",
    "plan_subject": "a module to infer a plan for is not known, or is not described completely",
    "plan_tokens": "the tokens of a module differ from what its plan expects",
    "network": "a request failed after all retries",
    "proxy": "a proxy is invalid, or rejects the request",
    "server_busy": "the server asks for a longer wait than the policy allows",
    "hub_folder": "a folder cannot be served as a Hub: it has no repositories, or the TCP port is taken",
    "hub_endpoint": "the endpoint does not answer like a Hub",
    "hub_file_missing": "a repository lacks a file at that revision",
    "hub_foreign_link": "a mirror links to another host for the list of files",
    "hub_gated": "a repository's terms have not been accepted, or no token was sent",
    "hub_refused": "the Hub rejects a request",
    "hub_repo_missing": "a repository does not exist, or is not visible with this token",
    "hub_revision_missing": "a repository has no such revision",
    "hub_token_invalid": "the Hub does not accept the token",
    "hub_token_missing": "a repository does not exist or needs a token, and none was sent",
    "disk_full": "the disk does not have enough space",
    "file_too_large": "the disk, or a limit of this shell, does not allow a file of that size",
    "output_dir": "the output directory cannot be used",
    "file_access": "a file outside the output directory cannot be used",
    "path_unsafe": "a file's path would be outside of the model directory, or cannot be stored",
    "source_missing": "a given file does not exist",
    "hash_mismatch": "a file's content differs from the hash in its repository or recipe",
    "lock_invalid": "port.lock cannot be read",
    "pattern_empty": "a recipe's pattern matches no file",
    "target_collision": "two files of a recipe have the same target",
    "target_foreign": "the target of a file exists and was not created by port-kit",
    "offline_incomplete": "a file is missing, and the network is disabled",
    "model_incomplete": "a model directory is damaged or incomplete",
    "interrupted": "a download was interrupted",
    "convert_layout": "a remote checkpoint has a layout that cannot be converted while downloading",
    "code_broken": "git code cannot be fetched, was changed, or cannot be imported",
    "code_clash": "a module of git code would hide or be hidden by another one",
    "code_url": "a git URL is not supported",
    "install_target": "the site-packages of this environment are not writable",
    "checkpoint_format": "a file has an unsupported format (an error page, an LFS pointer, GGUF, ONNX, ...)",
    "checkpoint_corrupt": "a safetensors or GGUF file is truncated, damaged, or contradicts its header",
    "checkpoint_unreadable": "a checkpoint's file cannot be read completely",
    "scaffold_name": "a new port's name is not a module name, is in use, or matches a model of vLLM-Omni",
    "scaffold_target": "the folder for a new port cannot be used",
    "scaffold_unsupported": "a model cannot be adapted; the reasons are listed",
    "inspect_target": "the target of an inspection is neither a folder nor a repository",
    "inspect_empty": "the target of an inspection has no weights and no configuration of a model",
    "pickle_drop": "a value to drop is not in the checkpoint",
    "pickle_corrupt": "a torch checkpoint is truncated or damaged",
    "pickle_unsafe": "a pickle requires code other than tensors; no code was executed",
    "pickle_unsupported": "a torch checkpoint has a tensor that safetensors cannot represent",
    "pickle_wrapper": "the tensors are under other keys of the pickle than specified",
    "manifest_invalid": "a manifest, or the checkpoint of a manifest, is invalid",
    "remap_ambiguous": "two rules match one source tensor",
    "remap_beyond_layers": "a rule maps a layer to a number that the module does not have",
    "remap_collision": "two source tensors are mapped to the same target",
    "remap_dead_rule": "a rule matches no tensor, or a tensor that it drops or keeps does not exist",
    "remap_dtype": "a value would lose precision or change its kind without permission of a rule",
    "remap_failed": "several kinds of problems, which are listed",
    "remap_incomplete_group": "parts of a fused tensor are missing",
    "remap_missing": "no source maps to a target tensor",
    "remap_interop": "an entry of another library's mapping cannot be expressed by rules, or the reverse",
    "remap_mixed": "a checkpoint has both original and converted names",
    "remap_op": "an operation does not exist, has wrong arguments, or has no inverse",
    "remap_overlap": "two copy tasks write or read the same elements",
    "remap_overflow": "a finite value overflows in a narrower dtype",
    "remap_pattern": "a source pattern is not a regular expression, or may take unbounded time",
    "remap_rules": "a rule set is invalid, or contradicts itself",
    "remap_shape": "a source tensor does not fit its target",
    "remap_size": "a size expression is invalid, or names an unknown size",
    "remap_slot": "a target has no such shard",
    "remap_template": "a target template is invalid, or names a group that its pattern lacks",
    "remap_tensor": "a stream has a sparse tensor, or a tensor without values",
    "remap_unexpected": "no rule matches a source tensor, or its target does not exist",
    "remap_unused": "part of a source tensor is neither used nor dropped with a reason",
    "parity_no_cases": "a port has no golden cases, or none matches",
    "goldens_invalid": "a goldens folder is incomplete or unreadable",
    "reference_missing": "a port declares no original code, or it is not fetched",
    "reference_python": "the interpreter for the original code cannot be started",
    "reference_failed": "the original code stopped with an error",
    "reference_timeout": "the original code did not finish in time",
    "reference_output": "the output of the original code is not a goldens folder, or its target exists",
    "parity_module": "a module whose output is compared does not exist, or is not called",
    "parity_shape": "the tensors of a port and of its original implementation have different shapes",
    "input_missing": "a request lacks its prompt, reference images or reference audio",
    "input_count": "the numbers of reference images and reference audios differ, or are too large",
    "input_size": "an image or video size of a request is not supported",
    "page_server": "the server that a page started did not become ready, or has ended",
    "engine_closed": "a request was sent to an engine that is closed",
    "engine_option": "an engine option is not supported by the model or platform, or in this combination",
    "lora_file": "a LoRA file is invalid or not supported",
    "input_value": "a request's parameter is out of range or misspelt",
    "input_type": "a request's parameter has the wrong type",
    "input_too_long": "a request's prompt has more tokens than the text encoder supports",
    "input_too_short": "a reference audio is too short",
    "input_unreadable": "a reference image or audio cannot be decoded",
    "cfg_early_read": "a pipeline reads the result of a guidance branch before it begins the next branch of the step",
    "cfg_rows": "the rows of a transformer call cannot be computed apart, so that guidance cannot be spread over ranks",
    "cache_passes": "cache_dit requires ranks with equal numbers of branches",
    "output_not_finite": "a result has values that are not finite, because of a setting or of the weights",
    "media_write": "a video file cannot be written or measured",
    "clip_settings": "a file has no settings of a request, or they belong to another port",
    "prompts_file": "a file of prompts has lines that are no requests of the port; each is listed",
    "sampling_invalid": "a solver, a number of steps or a shift is invalid",
    "component_config": "a component's config.json lacks a key, or has an unsupported value",
    "component_input": "an input tensor of a component has the wrong shape",
    "attention_backend": "the selected attention backend does not run on the CPU platform",
    "port_unregistrable": "a port's pipeline cannot be registered in vLLM-Omni",
    "upstream_changed": "vLLM-Omni, vLLM or torch differs from what the kit relies on",
    "upstream_record": "the surface of that series of vLLM-Omni was not recorded",
    "vllm_omni_version": "the installed vLLM-Omni is not in the series that the kit was tested with",
    "worker_died": "a test worker died before it returned a result",
    "worker_failed": "a test worker raised an error; its traceback is in the message",
    "worker_fork": "test workers cannot be forked from a process inside a torch.distributed world",
    "worker_timeout": "test workers did not finish in time",
    "outline_invalid": "an outline of a checkpoint names a tensor twice, or a tiny model lacks a part",
}


class PortKitError(Exception):
    """Base of all errors of the kit.

    Args:
        message: the found and the expected value, without a final full stop; control characters are escaped.
        code: a key of :data:`CODES`.
        hint: remedy in one sentence, which may name a command; escaped likewise.
        details: names, files and sizes for ``--json``; values must be JSON-serializable.
    """

    default_code: str | None = None

    def __init__(self, message: str, *, code: str | None = None, hint: str = "", **details: object) -> None:
        code = code or self.default_code
        if code not in CODES:
            raise KeyError(f"error code {quoted(code)} is not registered in port_kit.errors.CODES")
        message = escape_control_chars(message, keep="\n\t")
        super().__init__(message)
        self.message = message
        self.code: str = code
        self.hint = escape_control_chars(hint, keep="\n\t")
        self.details = details

    def __reduce__(self) -> tuple[object, ...]:
        """Return the constructor call that restores all attributes in another process."""
        return (_rebuild, (type(self), self.message, self.code, self.hint, self.details))

    def __str__(self) -> str:
        """Return code, message and hint, since other programs report only an error's text."""
        text = f"[{self.code}] {self.message}"
        return f"{text}\nhint: {self.hint}" if self.hint else text


def _rebuild(cls: type[PortKitError], message: str, code: str, hint: str, details: dict[str, object]) -> PortKitError:
    return cls(message, code=code, hint=hint, **details)


class PortNotFoundError(PortKitError):
    """No port has the given name. ``details["known"]`` lists the names that exist."""

    default_code = "port_not_found"


class OptionalDependencyError(PortKitError, ImportError):
    """A required optional package is not installed; the hint is the command that installs it."""

    default_code = "dependency_missing"


class DownloadError(PortKitError):
    """Planning, fetching, verifying, converting or assembling a model directory failed."""


class CheckpointError(PortKitError):
    """A checkpoint file is damaged, has another format, or requires code, which was not executed."""


class RemapError(PortKitError, ValueError):
    """A rule set is invalid, or does not map a checkpoint completely onto its modules."""


class ParallelError(PortKitError, ValueError):
    """A parallel layout is impossible, or N ranks do not compute the result of one rank."""


class ConfigError(PortKitError, ValueError):
    """A component's configuration is incomplete, contradictory or not supported."""

    default_code = "config_invalid"


class ParityError(PortKitError):
    """Goldens are missing, unreadable or unsupported by this port."""


class RegistrationError(PortKitError):
    """Registration in vLLM-Omni failed, or vLLM-Omni differs from the preconditions of a patch."""


class InspectError(PortKitError):
    """The target of an inspection is neither a folder nor a repository, or has no model."""

    default_code = "inspect_target"


class ScaffoldError(PortKitError):
    """A port cannot be written, because of its name, its folder or the model to adapt."""


class InputError(PortKitError, ValueError):
    """A request cannot be served, because of its references, sizes, counts, prompts or parameters."""

    default_code = "input_value"
