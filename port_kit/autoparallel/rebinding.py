"""Functions of modules rebound so that their attention calls go through routers.

A function is copied with an overlay of its globals in which the attention functions are replaced. Nothing is changed
outside of the modules of a plan. Modules with the same code share one copy, and so what torch.compile made of it. The
copy finds the router of the module that is running.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from port_kit.autoparallel.attention_functions import NAMES, PACKAGES, names_in, recognize
from port_kit.autoparallel.plan import AttentionSite
from port_kit.autoparallel.sites import Kernel, SiteRouter
from port_kit.autoparallel.tokens import Tokens
from port_kit.errors import ParallelError
from port_kit.escape import reason_of

#: Functions from a module to its attention call.
Chain = tuple[str, ...]


class Rebinder:
    """Rebound functions of one model.

    Args:
        model: model of the plan.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._running: list[dict[Chain, SiteRouter]] = []
        self._routers: dict[nn.Module, dict[Chain, SiteRouter]] = {}
        self._copies: dict[tuple[Any, Chain], FunctionType] = {}
        self._classes: dict[tuple[type, str, FunctionType], type] = {}
        # a forward that failed left its modules behind
        model.register_forward_pre_hook(torch.compiler.disable(lambda *_: self._running.clear()), prepend=True)

    def bind(self, path: str, sites: Sequence[AttentionSite], tokens: Tokens, kernel: Kernel | None) -> SiteRouter:
        """Rebind the functions of one module that lead to its attention calls.

        Args:
            path: module that makes the calls.
            sites: its sites, with equal functions.
            tokens: state of the forward.
            kernel: see :class:`~port_kit.autoparallel.sites.SiteRouter`.

        Returns:
            The router of these calls.

        Raises:
            ParallelError: ``plan_pattern``; the module has no such functions.
        """
        module, chain = self._model.get_submodule(path), sites[0].call
        router = SiteRouter(sites, tokens, kernel)
        try:
            self._rebind(module, chain)
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise ParallelError(
                f"{path}: {' > '.join(chain)} is not a chain of functions of {type(module).__name__} "
                f"({reason_of(error)})",
                code="plan_pattern",
                hint="infer the plan from this class: port-kit plan infer CLASS -o FILE",
            ) from error
        if module not in self._routers:
            self._routers[module] = {}
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)
        self._routers[module][chain] = router
        return router

    @torch.compiler.disable
    def _enter(self, module: nn.Module, _args: Any) -> None:
        routers = self._routers[module]
        for router in routers.values():
            router.restart()
        self._running.append(routers)

    @torch.compiler.disable
    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        for router in self._running.pop().values():
            router.require_calls(module)

    def _rebind(self, module: nn.Module, chain: Chain) -> None:
        methods = [name for name in chain[:-1] if "." in name or hasattr(type(module), name)]
        last = methods[-1]
        rest = chain[chain.index(last) + 1 :]
        if "." not in last:
            method = getattr(module, last)
            replaced = MethodType(self._copy(method.__func__, rest, chain), module)
            stored = [name for name, value in vars(module).items() if value == method]  # chosen by the constructor
            for name in (last, *stored):
                setattr(module, name, replaced)
            return
        attribute, _, name = last.rpartition(".")
        owner = copy.copy(getattr(module, attribute))
        owner.__class__ = self._derived(type(owner), name, self._copy(getattr(type(owner), name), rest, chain))
        setattr(module, attribute, owner)

    def _derived(self, base: type, name: str, function: FunctionType) -> type:
        key = base, name, function
        if key not in self._classes:
            self._classes[key] = type(base.__name__, (base,), {name: function})
        return self._classes[key]

    def _copy(self, function: Any, rest: Chain, chain: Chain) -> FunctionType:
        """Return the copy of a function in which the next function of the chain is replaced."""
        key = function, chain
        if key not in self._copies:
            self._copies[key] = self._overlay(function, rest, chain)
        return self._copies[key]

    def _overlay(self, function: Any, rest: Chain, chain: Chain) -> FunctionType:
        plain = function
        while hasattr(plain, "__wrapped__"):
            plain = plain.__wrapped__
        names = dict(plain.__globals__)
        if len(rest) > 1:
            names[rest[0]] = self._overlay(names[rest[0]], rest[1:], chain)
        else:
            used = names_in(plain.__code__)
            routed = {key: self._routed(names[key], chain) for key in used & set(names) if may_attend(names[key], used)}
            if not routed:
                raise KeyError(rest[0])
            names.update(routed)
        # torch.compile keeps what it compiled with the code object, and reads it through the globals
        code = plain.__code__.replace(co_name=plain.__code__.co_name)
        result = FunctionType(code, names, plain.__name__, plain.__defaults__, plain.__closure__)
        result.__kwdefaults__ = plain.__kwdefaults__
        return result

    def _routed(self, value: Any, chain: Chain) -> Any:
        """Return an attention function that attends through the router of the running module, or such a namespace."""
        signature = None if isinstance(value, ModuleType) else recognize(value)
        if signature is None:
            return Namespace(value, lambda attribute: self._routed(attribute, chain))

        def attend(*args: Any, **options: Any) -> Any:
            return self._running[-1][chain].attend(signature, value, *args, **options)

        return torch.compiler.disable(attend)


def may_attend(value: Any, used: frozenset[str]) -> bool:
    """Return True for an attention function, and for a module through which code that uses these names may call one."""
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0] in PACKAGES and not used.isdisjoint(NAMES)
    return recognize(value) is not None


class Namespace:
    """A module whose attention functions are replaced, and those of its submodules.

    Args:
        module: the module.
        replace: returns the replacement of a function or module.
    """

    def __init__(self, module: ModuleType, replace: Callable[[Any], Any]) -> None:
        self._module, self._replace = module, replace

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        replaced = self._replace(value) if may_attend(value, NAMES) else value
        self.__dict__[name] = replaced
        return replaced
