"""Every key of the config is read by some module, found by type inference over the source.

A key that parses and changes nothing is the quietest of mistakes. Matching names alone would not
find it, because sections share key names (`every`, for example). So each attribute access is
resolved to the section that its object is an instance of, using annotations, assignments, class
fields and function results. Where these do not determine the type, the read is not seen and the key
counts as unread: the test errs on the side of failing.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
import typing
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel

from tir_alp.algorithm.section import Section
from tir_alp.config import Config, CustomEngineConfig, TrainerConfig

PACKAGE = Path(__file__).parents[1] / "tir_alp"

_DESCRIBE = (
    *("config.py", "algorithm/presets.py", "algorithm/formula.py"),
    *("report/", "audit/"),
    *(f"doctor/{name}.py" for name in ("conversation", "engine", "examine", "machine", "table")),
)
"""Modules that only validate or describe a setting: a read there does not make it do anything."""

_NAME = re.compile(r"\w+")


def unread_keys(config: type[BaseModel], package: Path) -> list[str]:
    """Return the dotted names of the keys that no module of a package reads.

    Args:
        config: Class of the whole configuration.
        package: Folder of the package's source.
    """
    keys = dict(_keys(config))
    classes = {section for section, _ in keys}
    files = [
        file
        for file in sorted(package.rglob("*.py"))
        if not str(file.relative_to(package)).startswith(_DESCRIBE)
    ]
    sections: Sections = defaultdict(list)
    for section in classes:
        for name in _names_of(section):
            sections[name].append(section)
    reads = _reads([ast.parse(file.read_text()) for file in files], sections)
    reads |= _reads_of_methods(classes) | {(CustomEngineConfig, "kwargs")}  # for a user's factory
    return sorted(key for (section, field), key in keys.items() if (section, field) not in reads)


def _reads_of_methods(classes: Iterable[type[BaseModel]]) -> set[tuple[type[BaseModel], str]]:
    """Fields that a section's own properties and methods read, apart from its validators."""
    found = set()
    for section in classes:
        for base in section.__mro__:
            if not issubclass(base, BaseModel) or base is BaseModel:
                continue
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            for method in ast.walk(tree):
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_check"):
                    found |= {
                        (section, node.attr)
                        for node in ast.walk(method)
                        if isinstance(node, ast.Attribute)
                        and isinstance(node.value, ast.Name)
                        and node.value.id == "self"
                    }
    return found


def _keys(
    section: type[BaseModel], prefix: str = ""
) -> Iterator[tuple[tuple[type[BaseModel], str], str]]:
    for name, field in section.model_fields.items():
        if not _is_tag(field.annotation):
            yield (section, name), prefix + name
        for inner in _sections_in(field.annotation):
            yield from _keys(inner, f"{prefix}{name}.")


def _is_tag(annotation: object) -> bool:
    """Whether a field allows a single value only: such a field selects a section of a union."""
    return typing.get_origin(annotation) is typing.Literal and len(typing.get_args(annotation)) == 1


def _sections_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)


def _names_of(section: type[BaseModel]) -> Iterator[str]:
    """Yield the names of a section and of the sections it extends: annotations may use any."""
    for base in section.__mro__:
        if issubclass(base, BaseModel) and base.model_fields:
            yield base.__name__


Sections = dict[str, list[type[BaseModel]]]
"""Class name -> the sections that are instances of it: one, or all that extend a common base."""

Classes = frozenset[str]
"""Names of the classes that a value may be an instance of; empty if unknown."""
_UNKNOWN: Classes = frozenset()


class _Types:
    """Types of a program's attributes and function results, as far as they are known."""

    def __init__(self, sections: Sections) -> None:
        self.sections = sections
        self.members: defaultdict[str, dict[str, Classes]] = defaultdict(dict)
        """Class name -> attribute -> classes of its value."""
        self.results: dict[str, Classes] = {}
        """Function name -> classes of what it returns."""
        for name, some in sections.items():
            for field, info in (pair for each in some for pair in each.model_fields.items()):
                inner = _sections_in(info.annotation)
                if classes := frozenset(each.__name__ for each in inner):
                    self.members[name][field] = classes

    def of_annotation(self, annotation: ast.expr | None) -> Classes:
        if annotation is None:
            return _UNKNOWN
        return frozenset(_words(annotation)) & (self.sections.keys() | self.members.keys())

    def of(self, node: ast.expr, scope: dict[str, Classes]) -> Classes:
        """Return the classes that the value of an expression may be an instance of."""
        match node:
            case ast.Name(id=name):
                return scope.get(name, _UNKNOWN)
            case ast.Attribute(value=value, attr=attr):
                owners = self.of(value, scope)
                return _UNKNOWN.union(*(self.members[o].get(attr, _UNKNOWN) for o in owners))
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                made = frozenset({name}) if name in self.members else _UNKNOWN
                return self.results.get(name, made)
            case ast.IfExp(body=body, orelse=orelse):
                return self.of(body, scope) | self.of(orelse, scope)
            case ast.BoolOp(values=values):
                return _UNKNOWN.union(*(self.of(value, scope) for value in values))
            case ast.Await(value=value) | ast.NamedExpr(value=value):
                return self.of(value, scope)
        return _UNKNOWN


def _words(annotation: ast.expr) -> Iterable[str]:
    return _NAME.findall(ast.unparse(annotation))


def _reads(modules: Iterable[ast.Module], sections: Sections) -> set[tuple[type[BaseModel], str]]:
    """Return the section fields that modules read."""
    modules = list(modules)
    known = _Types(sections)
    classes = [n for module in modules for n in ast.walk(module) if isinstance(n, ast.ClassDef)]
    for node in classes:
        known.members[node.name]  # makes the class known, before its attributes are
    for module in modules:
        for node in ast.walk(module):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if result := known.of_annotation(node.returns):
                known.results[node.name] = result
    reads: set[tuple[type[BaseModel], str]] = set()
    for _ in range(2):  # the second pass knows the attributes that the first one found
        for module in modules:
            _Reader(known, reads).visit(module)
    return reads


class _Reader(ast.NodeVisitor):
    """Walks a module and keeps the types of the names in scope."""

    def __init__(self, known: _Types, reads: set[tuple[type[BaseModel], str]]) -> None:
        self._known, self._reads = known, reads
        self._scope: dict[str, Classes] = {}
        self._class: str | None = None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._class = self._class, node.name
        for statement in node.body:
            match statement:
                case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
                    if classes := self._known.of_annotation(annotation):
                        self._known.members[node.name][name] = classes
        self.generic_visit(node)
        self._class = outer

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer, self._scope = self._scope, dict(self._scope)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            classes = self._known.of_annotation(argument.annotation)
            if argument.arg == "self" and self._class is not None:
                classes = frozenset({self._class})
            self._name(argument.arg, classes)
        self.generic_visit(node)
        self._scope = outer

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for each, value in zip(target.elts, node.value.elts, strict=False):
                    self._assign(each, value)
            else:
                self._assign(target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self._assign(node.target, node.value)

    def visit_withitem(self, node: ast.withitem) -> None:
        self.generic_visit(node)
        if node.optional_vars is not None:
            self._assign(node.optional_vars, node.context_expr)

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self._assign(node.target, node.iter)  # the classes of a tuple are those of its items
        self.generic_visit(node)

    visit_AsyncFor = visit_For

    def visit_ListComp(
        self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp
    ) -> None:
        outer, self._scope = self._scope, dict(self._scope)
        for generator in node.generators:  # they follow the element in the tree
            self._assign(generator.target, generator.iter)
        self.generic_visit(node)
        self._scope = outer

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            return
        for name in self._known.of(node.value, self._scope) & self._known.sections.keys():
            for section in self._known.sections[name]:
                own = section.model_fields
                fields = own if node.attr == "model_dump" else (node.attr,)
                self._reads.update((section, each) for each in fields if each in own)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        classes = self._known.of(value, self._scope)
        match target:
            case ast.Name(id=name):
                self._name(name, classes)
            case ast.Attribute(value=owner, attr=attr):
                for each in self._known.of(owner, self._scope) if classes else ():
                    self._known.members[each].setdefault(attr, classes)

    def _name(self, name: str, classes: Classes) -> None:
        self._scope.pop(name, None)
        if classes:
            self._scope[name] = classes


# -------------------------------------------------------------------------------------- tests


class WiderTrainer(TrainerConfig):
    every: int = 0
    """A key that no module reads, although `every` of two other sections is read."""


class New(Section):
    read: int = 0
    unread: int = 0


class Wider(Config):
    trainer: TrainerConfig = WiderTrainer()
    new: New = New()


Wider.model_fields["trainer"].annotation = WiderTrainer


def test_every_key_of_the_config_is_read():
    assert unread_keys(Config, PACKAGE) == []


def test_an_unused_config_key_is_named(tmp_path):
    for file in PACKAGE.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "user.py").write_text("def use(config: Wider):\n    return config.new.read\n")
    unread = set(unread_keys(Wider, tmp_path)) - set(unread_keys(Config, tmp_path))
    assert unread == {"new.unread", "trainer.every"}


class Piece(New):
    share: float = 1.0
    forgotten: float = 1.0


class Whole(New):
    pieces: tuple[Piece, ...] = ()


class Nested(Config):
    whole: Whole = Whole()


def test_reads_through_loops_and_base_sections_are_seen(tmp_path):
    (tmp_path / "user.py").write_text(
        "def use(one: New):\n    return one.read\n\n"
        "def all(config: Nested):\n    return [piece.share for piece in config.whole.pieces]\n"
    )
    unread = {key for key in unread_keys(Nested, tmp_path) if key.startswith("whole")}
    assert unread == {"whole.unread", "whole.pieces.unread", "whole.pieces.forgotten"}
