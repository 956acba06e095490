"""The code text of an archive, read as data: which operators lie between the input and the answer.

Nothing is computed here but shapes of loops and constants made of constants. Calls are followed into the file's own
functions; ``if`` with an unknown condition gives either value; the body of a loop over steps is read once, and what it
carries from step to step becomes a :class:`Node` "carried".
"""

import ast
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cellstep.rescue.archive import Archive, Object

_WORK_LIMIT = 2_000_000  # statements, expressions and values handed on, calls of calls included
_TEXT_LIMIT = 4 << 20  # characters of one file
_UNROLL_LIMIT = 64

#: Operators that change no value that a model for inference computes.
_SAME = {
    "torch.alias", "torch.clone", "torch.contiguous", "torch.cpu", "torch.cuda", "torch.detach", "torch.dropout",
    "torch.feature_dropout", "torch.to", "torch.type_as", "torch.float", "torch.double",
    "ops.prim.NumToTensor", "ops.aten.contiguous", "int", "float", "torch.list",
}  # fmt: skip
_NUMBERS: dict[str, Callable[..., Any]] = {
    "torch.add": operator.add, "torch.sub": operator.sub, "torch.mul": operator.mul, "torch.div": operator.truediv,
    "torch.floordiv": operator.floordiv, "torch.remainder": operator.mod, "torch.neg": operator.neg,
    "torch.eq": operator.eq, "torch.ne": operator.ne, "torch.lt": operator.lt, "torch.le": operator.le,
    "torch.gt": operator.gt, "torch.ge": operator.ge, "torch.__not__": operator.not_, "bool": bool,
}  # fmt: skip
#: Operators on constants that frozen and scaled models are full of.
_FOLDED: dict[str, Callable[..., Tensor]] = {
    "torch.t": torch.t, "torch.numpy_T": torch.t, "torch.add": torch.add, "torch.sub": torch.sub,
    "torch.rsub": torch.rsub, "torch.mul": torch.mul, "torch.div": torch.div, "torch.sqrt": torch.sqrt,
    "torch.rsqrt": torch.rsqrt, "torch.reciprocal": torch.reciprocal, "torch.neg": torch.neg, "torch.exp": torch.exp,
    "torch.unsqueeze": torch.unsqueeze, "torch.squeeze": torch.squeeze, "torch.transpose": torch.transpose,
}  # fmt: skip
#: Every spelling of an operator under one name, in-place ones included.
_ALIASES = {
    "torch.divide": "torch.div", "torch.true_divide": "torch.div", "torch.multiply": "torch.mul",
    "torch.subtract": "torch.sub", "torch.mm": "torch.matmul", "torch.bmm": "torch.matmul",
    "torch.unsafe_chunk": "torch.chunk", "torch.unsafe_split": "torch.split", "torch.concat": "torch.cat",
    "torch.concatenate": "torch.cat", "torch.swapaxes": "torch.transpose",
    "torch.feature_dropout_": "torch.dropout", "torch.special_expit": "torch.sigmoid", "torch.reshape": "torch.view",
}  # fmt: skip


class Unreadable(ValueError):
    """The code has something that is not followed here; the text says what."""


class Node:
    """A value that depends on the input: an operator and its arguments. Equal ones are one object."""

    __slots__ = ("args", "op")

    def __init__(self, op: str, args: tuple[Any, ...]) -> None:
        self.op, self.args = op, args


class _Function:
    def __init__(self, tree: ast.FunctionDef, scope: str, owner: Object | None) -> None:
        self.tree, self.scope, self.owner = tree, scope, owner


class _Raised(Exception):
    """A branch that only raises."""


class Reader:
    """Follows ``forward`` of an archive; afterwards :attr:`result` is its answer and :attr:`nodes` all values."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._trees: dict[str, dict[str, ast.ClassDef | ast.FunctionDef]] = {}
        self._own: dict[int, dict[str, ast.ClassDef | ast.FunctionDef]] = {}
        self._interned: dict[Any, Any] = {}
        self._overlay: dict[tuple[int, str], Any] = {}
        self._folds: dict[int, Tensor] = {}  # of a transposed constant to the constant
        self._kept: list[Any] = []  # keeps ids in keys those of living objects
        self._changed: dict[Node, Any] = {}  # by operators in place
        self._work = 0
        self.nodes: list[Node] = []
        self.carried: dict[Node, Any] = {}  # what a carried value is at the end of a step
        self.result: Any = None

    def read(self) -> Any:
        """The answer of ``forward`` as a :class:`Node` or a nest of them.

        Raises:
            Unreadable: the code is damaged, or has no ``forward``, or does what is not followed.
        """
        try:
            function = self._method(self._archive.root, "forward")
            if function is None:
                raise Unreadable("no forward in the code")
            arguments: list[Any] = [self.node("input", a.arg) for a in function.tree.args.args[1:]]
            defaults = function.tree.args.defaults
            for k, default in enumerate(defaults):
                if isinstance(default, ast.Constant):
                    arguments[len(arguments) - len(defaults) + k] = default.value
            self.result = self._invoke(function, [self._archive.root, *arguments], {})
        except Unreadable:
            raise
        except (RecursionError, MemoryError):
            raise Unreadable("code nested too deep") from None
        except _Raised:
            raise Unreadable("a forward that only raises") from None
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise Unreadable(f"code out of the ordinary ({' '.join(str(error).split())[:80]})") from None
        return self.result

    def node(self, op: str, *args: Any) -> Node:
        key = (op, *(self._key(arg) for arg in args))
        found = self._interned.get(key)
        if found is None:
            found = self._interned[key] = Node(op, tuple(tuple(a) if isinstance(a, list) else a for a in args))
            self.nodes.append(found)
            self._kept.append(args)
        return found

    def _key(self, value: Any) -> Any:
        self._count()
        if isinstance(value, (list, tuple)):
            return tuple(self._key(item) for item in value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return type(value).__name__, value
        return id(value)

    # Where names of the code are found

    def _parse(self, text: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
        if len(text) > _TEXT_LIMIT:
            raise Unreadable("more code than is read here")
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise Unreadable("code text that does not parse") from None
        return {item.name: item for item in tree.body if isinstance(item, (ast.ClassDef, ast.FunctionDef))}

    def _definition(self, name: str) -> ast.ClassDef | ast.FunctionDef | None:
        scope, _, last = name.rpartition(".")
        if scope not in self._trees:
            self._trees[scope] = self._parse(self._archive.sources.get(scope, ""))
        return self._trees[scope].get(last)

    def _method(self, owner: Object, name: str) -> _Function | None:
        if owner.source:
            if id(owner) not in self._own:
                self._own[id(owner)] = self._parse(owner.source)
            found = self._own[id(owner)].get(name)
            return _Function(found, "", owner) if isinstance(found, ast.FunctionDef) else None
        definition = self._definition(owner.name)
        if isinstance(definition, ast.ClassDef):
            for item in definition.body:
                if isinstance(item, ast.FunctionDef) and item.name == name:
                    return _Function(item, owner.name, owner)
        return None

    def _attribute(self, owner: Any, name: str) -> Any:
        if isinstance(owner, Node):
            return self.node("attribute", owner, name)
        if not isinstance(owner, Object):
            raise Unreadable(f"the attribute {name} of a value")
        if (id(owner), name) in self._overlay:
            return self._overlay[id(owner), name]
        if name in owner.state:
            return owner.state[name]
        definition = self._definition(owner.name) if owner.name else None
        for item in definition.body if isinstance(definition, ast.ClassDef) else ():
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id == name:
                return ast.literal_eval(item.value) if item.value is not None else None
        raise Unreadable(f"an attribute {name} that the file does not hold")

    # Statements

    def _invoke(self, function: _Function, args: Sequence[Any], keywords: dict[str, Any]) -> Any:
        parameters = function.tree.args.args
        scope = dict(zip((p.arg for p in parameters), args, strict=False))
        scope.update(keywords)
        defaults = function.tree.args.defaults
        for parameter, default in zip(parameters[len(parameters) - len(defaults) :], defaults, strict=True):
            if parameter.arg not in scope:
                scope[parameter.arg] = self._value(default, scope)
        return self._block(function.tree.body, scope)

    def _block(self, body: Sequence[ast.stmt], scope: dict[str, Any]) -> Any:
        """Follow statements; the value of ``return``, or None where there is none."""
        for statement in body:
            self._count()
            if isinstance(statement, ast.Return):
                return None if statement.value is None else self._value(statement.value, scope)
            if isinstance(statement, ast.Assign):
                value = self._value(statement.value, scope)
                for target in statement.targets:
                    self._assign(target, value, scope)
            elif isinstance(statement, ast.AnnAssign):
                if statement.value is not None:
                    self._assign(statement.target, self._value(statement.value, scope), scope)
            elif isinstance(statement, ast.Expr):
                self._value(statement.value, scope)
            elif isinstance(statement, ast.If):
                answer = self._branches(statement, scope)
                if answer is not None:
                    return answer
            elif isinstance(statement, (ast.For, ast.While)):
                self._loop(statement, scope)
            elif isinstance(statement, ast.With):
                answer = self._block(statement.body, scope)
                if answer is not None:
                    return answer
            elif not isinstance(statement, (ast.Pass, ast.Assert)):
                raise Unreadable(f"a statement {type(statement).__name__}")
        return None

    def _count(self, work: int = 1) -> None:
        self._work += work
        if self._work > _WORK_LIMIT:
            raise Unreadable("more code than is read here")

    def _assign(self, target: ast.expr, value: Any, scope: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            scope[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            for k, item in enumerate(target.elts):
                self._assign(item, self._item(value, k, len(target.elts)), scope)
        elif isinstance(target, ast.Attribute):
            owner = self._value(target.value, scope)
            if not isinstance(owner, Object):
                raise Unreadable("an attribute set on a value")
            self._overlay[id(owner), target.attr] = value
        else:
            raise Unreadable("an assignment to a part of a value")

    def _branches(self, statement: ast.If, scope: dict[str, Any]) -> Any:
        condition = self._value(statement.test, scope)
        if isinstance(condition, (bool, int)):
            return self._block(statement.body if condition else statement.orelse, scope)
        self._count(len(scope) + len(self._overlay))
        sides = []
        overlay = dict(self._overlay)
        for body in (statement.body, statement.orelse):
            local = dict(scope)
            self._overlay = dict(overlay)
            try:
                answer = self._block(body, local)
            except _Raised:
                continue
            sides.append((local, answer, self._overlay))
        self._overlay = overlay
        if not sides:
            raise _Raised
        if len(sides) == 1:
            local, answer, self._overlay = sides[0]
            scope.update(local)
            return answer
        (first, one, kept), (second, other, also) = sides
        for name in {**first, **second}:
            if name in first and name in second:
                scope[name] = self._either(first[name], second[name])
            else:
                scope[name] = first.get(name, second.get(name))
        for place in {**kept, **also}:
            self._overlay[place] = self._either(kept[place], also[place]) if place in kept and place in also else None
        return self._either(one, other) if one is not None and other is not None else one if other is None else other

    def _either(self, one: Any, other: Any) -> Any:
        """One value or another: the same in both, or the one without the dimension that a lone row is given."""
        if one is other or self._key(one) == self._key(other):
            return one
        for a, b in ((one, other), (other, one)):
            if isinstance(a, Node) and a.op == "uninitialized":
                return b
            if isinstance(a, Node) and a.op in ("unsqueeze", "squeeze") and a.args[0] is b:
                return b
        for a, b in ((one, other), (other, one)):
            if isinstance(a, (tuple, list)) and (isinstance(b, Node) or (type(a) is type(b) and len(a) == len(b))):
                parts = [self._either(item, self._item(b, k, len(a))) for k, item in enumerate(a)]
                return tuple(parts) if isinstance(a, tuple) else parts
        return self.node("either", one, other)

    def _loop(self, statement: ast.For | ast.While, scope: dict[str, Any]) -> None:
        times: Any = None
        if isinstance(statement, ast.For):
            call = statement.iter
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range"):
                raise Unreadable("a loop over something else than a range")
            times = self._value(call.args[-1], scope)
        if isinstance(times, int) and 0 <= times <= _UNROLL_LIMIT and isinstance(statement, ast.For):
            for k in range(times):
                self._assign(statement.target, k, scope)
                self._block(statement.body, scope)
            return
        self._count(len(scope))
        assigned = {name.id for item in statement.body for name in ast.walk(item) if isinstance(name, ast.Name)
                    and isinstance(name.ctx, ast.Store)}  # fmt: skip
        made: list[tuple[Node, Callable[[], Any]]] = []

        def carry(start: Any, end: Callable[[], Any]) -> Any:
            if isinstance(start, tuple):
                return tuple(carry(item, lambda k=k: end()[k]) for k, item in enumerate(start))  # type: ignore[misc]
            if not isinstance(start, (Node, Tensor)):
                return start
            symbol = self.node("carried", len(self.carried) + len(made), start)
            made.append((symbol, end))
            return symbol

        seen = set()
        for name, value in list(scope.items()):
            if isinstance(value, list):
                if id(value) not in seen:
                    seen.add(id(value))
                    for k, item in enumerate(value):
                        value[k] = carry(item, lambda value=value, k=k: value[k])  # type: ignore[misc]
            elif name in assigned:
                scope[name] = carry(value, lambda name=name: scope[name])  # type: ignore[misc]
        lengths = {id(value): (value, len(value)) for value in scope.values() if isinstance(value, list)}
        if isinstance(statement, ast.For):
            self._assign(statement.target, self.node("step"), scope)
        if self._block(statement.body, scope) is not None:
            raise Unreadable("a return amid a loop")
        for value, length in lengths.values():
            value[length:] = [self.node("each", item) for item in value[length:]]
        for symbol, end in made:
            self.carried[symbol] = end()
        for symbol, _ in made:
            if self.carried[symbol] is symbol:  # not changed in the loop
                self._replace(scope, symbol)

    def _replace(self, scope: dict[str, Any], symbol: Node) -> None:
        self._count(len(scope))
        for name, value in scope.items():
            if value is symbol:
                scope[name] = symbol.args[1]
            elif isinstance(value, list):
                value[:] = [symbol.args[1] if item is symbol else item for item in value]

    # Expressions

    def _value(self, tree: ast.expr, scope: dict[str, Any]) -> Any:
        self._count()
        if isinstance(tree, ast.Constant):
            return tree.value
        if isinstance(tree, ast.Name):
            if tree.id in scope:
                value = scope[tree.id]
                while isinstance(value, Node) and value in self._changed:
                    value = self._changed[value]
                return value
            return {"inf": float("inf"), "nan": float("nan")}.get(tree.id) or self.node("name", tree.id)
        if isinstance(tree, ast.Tuple):
            return tuple(self._value(item, scope) for item in tree.elts)
        if isinstance(tree, ast.List):
            return [self._value(item, scope) for item in tree.elts]
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, (ast.USub, ast.Not)):
            value = self._value(tree.operand, scope)
            if not isinstance(value, (bool, int, float)):
                return self.node("neg", value)
            return -value if isinstance(tree.op, ast.USub) else not value
        if isinstance(tree, ast.Subscript):
            value = self._value(tree.value, scope)
            return self._item(value, self._value(tree.slice, scope), None)
        if isinstance(tree, ast.Attribute):
            name = self._dotted(tree, scope)
            if name is None:
                return self._attribute(self._value(tree.value, scope), tree.attr)
            if name.startswith("CONSTANTS.c"):
                return self._archive.constants[int(name[11:])]
            return self.node("name", name)
        if isinstance(tree, ast.Call):
            return self._call(tree, scope)
        raise Unreadable(f"an expression {type(tree).__name__}")

    def _dotted(self, tree: ast.expr, scope: dict[str, Any]) -> str | None:
        """A name with dots that starts with no variable: torch.add, CONSTANTS.c0, __torch__.f."""
        parts = []
        while isinstance(tree, ast.Attribute):
            parts.append(tree.attr)
            tree = tree.value
        if not isinstance(tree, ast.Name) or tree.id in scope:
            return None
        return ".".join([tree.id, *reversed(parts)])

    def _item(self, value: Any, k: Any, count: int | None) -> Any:
        if isinstance(value, (list, tuple, dict)):
            if isinstance(k, (int, str)):
                item = value[k]  # type: ignore[index]
                return item.args[0] if _is_each(item) else item
            return self.node("item", list(value) if not isinstance(value, dict) else "dict", k)
        if isinstance(value, Node):
            if value.op == "either":
                return self._either(self._item(value.args[0], k, count), self._item(value.args[1], k, count))
            if value.op == "chunk":
                return self.node("part", value.args[0], value.args[1], k, *value.args[2:])
            if value.op == "unbind":
                return self.node("select", value.args[0], *(value.args[1:] or (0,)), k)
            return self.node("item", value, k)
        raise Unreadable("an item of a value that has none")

    def _call(self, tree: ast.Call, scope: dict[str, Any]) -> Any:
        callee = tree.func
        name = self._dotted(callee, scope) if isinstance(callee, (ast.Attribute, ast.Name)) else None
        if name in ("annotate", "unchecked_cast"):
            return self._value(tree.args[1], scope)
        if name == "uninitialized":
            return self.node("uninitialized")
        args = [self._value(item, scope) for item in tree.args]
        keywords = {item.arg: self._value(item.value, scope) for item in tree.keywords if item.arg}
        if name is None:
            if isinstance(callee, ast.Attribute):
                owner = self._value(callee.value, scope)
                function = self._method(owner, callee.attr) if isinstance(owner, Object) else None
                if function is None:
                    raise Unreadable(f"a call of {callee.attr}")
                return self._invoke(function, [owner, *args], keywords)
            target = self._value(callee, scope)
            if not isinstance(target, Node) or target.op != "name":
                raise Unreadable("a call of a value")
            name = str(target.args[0])
        if name == "getattr":
            return self._attribute(args[0], args[1])
        if name.startswith("__torch__"):
            definition = self._definition(name)
            if isinstance(definition, ast.FunctionDef):
                return self._invoke(_Function(definition, name, None), args, keywords)
            return self.node("object", name, *args)
        return self._operator(name, args, keywords)

    def _operator(self, name: str, args: list[Any], keywords: dict[str, Any]) -> Any:
        if name == "ops.prim.RaiseException":
            raise _Raised
        if name == "torch.append":
            args[0].append(args[1])
            return args[0]
        if name == "torch._set_item":
            if not isinstance(args[0], (list, dict)) or not isinstance(args[1], (int, str)):
                raise Unreadable("a list that is filled at a place not known")
            args[0][args[1]] = args[2]
            return args[0]
        if name == "torch.copy_":  # into a buffer of the module; the values of this call are already read
            if self._is_buffer(args[0]):
                return args[0]
            raise Unreadable("a value changed in place")
        if name in ("torch.__is__", "torch.__isnot__"):
            same = args[0] is None and args[1] is None
            return same if name == "torch.__is__" else not same
        if name == "torch.len" and isinstance(args[0], (list, tuple, str)) and not any(map(_is_each, args[0])):
            return len(args[0])
        name = name.replace("ops.aten.", "torch.")
        if name.endswith("_") and not name.endswith("__"):
            made = self._operator(name[:-1], list(args), keywords)
            if isinstance(args[0], Node) and made is not args[0]:
                if args[0] in self._changed or args[0].op in ("slice", "select", "carried"):
                    raise Unreadable("a value changed in place")
                self._changed[args[0]] = made
            return made
        name = _ALIASES.get(name, name)
        if name in _SAME and args:
            return args[0]
        if keywords and name in ("torch.add", "torch.sub"):
            args = [*args, keywords.get("alpha", 1)]
            keywords = {}
        if name in ("torch.add", "torch.sub", "torch.rsub") and len(args) == 3:
            if args[2] != 1:
                raise Unreadable(f"{name} with a factor")
            args = args[:2]
        if args and all(isinstance(arg, (bool, int, float)) for arg in args) and name in _NUMBERS:
            number = _NUMBERS[name](*args)
            if abs(number) > 1 << 63 and number != float("inf"):
                raise Unreadable("numbers out of the ordinary")
            return number
        if name in _FOLDED and not keywords and all(isinstance(arg, (Tensor, bool, int, float)) for arg in args):
            return self._fold(name, args)
        return self._normal(name.removeprefix("torch."), args, keywords)

    def _is_buffer(self, value: Any) -> bool:
        """Whether a value is a buffer of a module, whole or in part."""
        while isinstance(value, Node) and value.op in ("slice", "select") and value.args:
            value = value.args[0]
        return isinstance(value, Tensor)

    def origin(self, tensor: Tensor) -> Tensor:
        """The tensor of the file that a constant is, or is the transpose of."""
        return self._folds.get(id(tensor), tensor)

    def _fold(self, name: str, args: list[Any]) -> Tensor:
        key = ("fold", name, *(self._key(arg) for arg in args))
        if key not in self._interned:
            transposed = name in ("torch.t", "torch.numpy_T") or (name == "torch.transpose" and args[0].dim() == 2)
            if transposed and id(args[0]) in self._folds:
                self._interned[key] = self._folds[id(args[0])]
            else:
                shapes = [arg.shape for arg in args if isinstance(arg, Tensor)]
                if len(shapes) > 1 and torch.broadcast_shapes(*shapes).numel() > max(shape.numel() for shape in shapes):
                    raise Unreadable("constants that grow")
                made = _FOLDED[name](*(torch.tensor(arg) if k == 0 and not isinstance(arg, Tensor) else arg
                                       for k, arg in enumerate(args)))  # fmt: skip
                self._interned[key] = made
                if transposed:
                    self._folds[id(made)] = args[0]
            self._kept.append((args, self._interned[key]))
        found: Tensor = self._interned[key]
        return found

    def _normal(self, op: str, args: list[Any], keywords: dict[str, Any]) -> Any:
        """A node in which every kind of linear layer is ("linear", x, weight (out, in), bias or None)."""
        if op == "addmm":
            if any(keywords.get(name, 1) != 1 for name in ("alpha", "beta")):
                raise Unreadable("addmm with factors")
            return self._plus(self._normal("matmul", args[1:3], {}), args[0])
        if op == "matmul" and isinstance(args[1], Tensor) and args[1].dim() == 2:
            return self.node("linear", args[0], self._fold("torch.t", [args[1]]), None)
        if op == "linear" and all(isinstance(arg, Tensor) or arg is None for arg in args[1:]):
            return self.node("linear", args[0], args[1], args[2] if len(args) > 2 else None)
        if op == "add":
            return self._plus(args[0], args[1])
        if op == "stack" and isinstance(args[0], list) and len(args[0]) == 1 and _is_each(args[0][0]):
            return self.node("steps", args[0][0].args[0], keywords.get("dim", args[1] if len(args) > 1 else 0))
        if op == "cat" and isinstance(args[0], list) and len(args[0]) == 1:
            if _is_each(args[0][0]):
                inner = args[0][0].args[0]
                along = args[1] if len(args) > 1 else keywords.get("dim", 0)
                if isinstance(inner, Node) and inner.op == "unsqueeze" and inner.args[1] == along:
                    return self.node("steps", inner.args[0], along)
        return self.node(op, *args, *(v for k, v in keywords.items() if k not in ("dtype", "layout", "device")))

    def _plus(self, one: Any, other: Any) -> Any:
        for a, b in ((one, other), (other, one)):
            fits = isinstance(a, Node) and a.op == "linear" and a.args[2] is None and isinstance(b, Tensor)
            if fits and b.shape == (a.args[1].size(0),):
                return self.node("linear", a.args[0], a.args[1], b)
        return self.node("add", one, other)


def _is_each(value: Any) -> bool:
    """Whether a value in a list stands for one of every step."""
    return isinstance(value, Node) and value.op == "each"
