"""The code text of an archive as data: its operators, one by one, on numbers of our choice.

Neither Python nor torch runs anything of a file. Its text is parsed, and what it says is followed here: assignments,
``if``, loops, calls of the file's own functions, and the operators of one list, which compute numbers from numbers and
do nothing else. Anything else ends the evaluation. Work and memory have limits that no file can lift.

All floating-point numbers are float64, whatever the file holds, so that what is compared with the answers is compared
far below the rounding of float32. Dropout does nothing: a model is taken as one for inference.
"""

import ast
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cellstep.rescue.archive import Archive, Object

_TEXT_LIMIT = 4 << 20  # characters of one file
_STEP_LIMIT = 40_000  # statements, expressions and operators of one call of forward
_TOTAL_STEP_LIMIT = 600_000  # and of all calls
_SIZE_LIMIT = 1 << 24  # values of one tensor
_TOTAL_SIZE_LIMIT = 1 << 27  # values made in one call
_PRODUCT_LIMIT = 1 << 33  # multiplications of matrices in one call
_LIST_LIMIT = 1 << 14

_NUMBERS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "floordiv": operator.floordiv, "remainder": operator.mod, "eq": operator.eq, "ne": operator.ne, "lt": operator.lt,
    "le": operator.le, "gt": operator.gt, "ge": operator.ge, "__not__": operator.not_, "__and__": operator.and_,
    "__or__": operator.or_, "max": max, "min": min, "sqrt": math.sqrt, "exp": math.exp, "log": math.log,
    "floor": math.floor, "ceil": math.ceil, "abs": abs, "int": int, "float": float, "bool": bool, "Int": int,
    "Float": float, "Bool": bool,
}  # fmt: skip
#: Every spelling of an operator under one name.
_ALIASES = {
    "divide": "div", "true_divide": "div", "multiply": "mul", "subtract": "sub", "unsafe_chunk": "chunk",
    "unsafe_split": "split", "split_with_sizes": "split", "concat": "cat", "concatenate": "cat",
    "swapaxes": "transpose", "special_expit": "sigmoid", "feature_dropout": "dropout", "alpha_dropout": "dropout",
    "feature_alpha_dropout": "dropout", "empty": "zeros", "numpy_T": "t",
}  # fmt: skip
_ELEMENTWISE = {
    "abs", "add", "addcmul", "ceil", "celu", "clamp", "clamp_max", "clamp_min", "cos", "div", "elu", "erf", "exp",
    "floor", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log", "log1p", "masked_fill", "mish",
    "mul", "neg", "pow", "reciprocal", "relu", "relu6", "round", "rsqrt", "selu", "sigmoid", "sign", "silu", "sin",
    "softplus", "sqrt", "square", "sub", "tanh", "trunc",
}  # fmt: skip
#: Operators that give the values they are given, in another order or fewer of them.
MOVES = {
    "alias", "clone", "contiguous", "detach", "expand", "expand_as", "flatten", "flip", "index_select", "movedim",
    "narrow", "permute", "repeat", "reshape", "select", "slice", "squeeze", "t", "transpose", "unflatten", "unsqueeze",
    "view", "view_as", "cat", "stack", "item", "chunk", "split", "unbind",
}  # fmt: skip
_CREATORS = {"zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like",
             "arange", "scalar_tensor"}  # fmt: skip
_OTHERS = {
    "addmm", "amax", "amin", "argmax", "batch_norm", "bmm", "cumsum", "eq", "ge", "gt", "layer_norm", "le", "linear",
    "log_softmax", "logical_and", "logical_not", "logical_or", "lstm", "lstm_cell", "lt", "matmul", "maximum", "mean",
    "minimum", "mm", "ne", "rsub", "softmax", "std", "sum", "tril", "triu", "var", "where", "gru", "gru_cell",
}  # fmt: skip
_ALLOWED = (_ELEMENTWISE | MOVES | _CREATORS | _OTHERS) - {"item"}
_PRODUCTS = {"addmm", "bmm", "linear", "matmul", "mm"}
_IN_PLACE = _ELEMENTWISE | {"copy", "fill", "squeeze", "t", "transpose", "unsqueeze", "zero"}
_INTEGERS = {0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 11: torch.bool}
_CASTS = {"to", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda"}
_ITEMS = {"int", "float", "bool", "item", "Int", "Float", "Bool", "IntImplicit", "FloatImplicit", "ScalarImplicit"}
#: Calls without an effect on numbers.
_SILENT = {"warn", "print", "device", "manual_seed", "is_autocast_enabled", "no_grad"}
_ON_LISTS = {"__getitem__", "slice", "len", "list", "__contains__", "keys"}
_ABOUT_PLACES = {"layout", "device", "pin_memory", "memory_format", "non_blocking"}


#: What code and tensors out of the ordinary may raise where they are put to use.
ODD = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class Unreadable(ValueError):
    """The code has something that is not followed here; the text says what."""


class Node:
    """Where a tensor came from: an operator and its arguments, tensors among them as nodes.

    ``root`` is the file's own tensor where this is one; ``constant`` says that no input is behind it.
    """

    __slots__ = ("args", "constant", "op", "root", "value")

    def __init__(self, op: str, args: tuple[Any, ...], value: Any, root: Tensor | None = None) -> None:
        self.op, self.args, self.value, self.root = op, args, value, root
        self.constant: bool = op not in ("input", "given") and all(node.constant for node in below(args))


def below(args: Any) -> Iterator[Node]:
    """The nodes among arguments and their lists."""
    for arg in args:
        if isinstance(arg, Node):
            yield arg
        elif isinstance(arg, tuple):
            yield from below(arg)


class Definitions:
    """Where the functions and classes of an archive's code are found."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._trees: dict[str, dict[str, ast.ClassDef | ast.FunctionDef]] = {}
        self._own: dict[int, dict[str, ast.ClassDef | ast.FunctionDef]] = {}

    def named(self, name: str) -> ast.ClassDef | ast.FunctionDef | None:
        scope, _, last = name.rpartition(".")
        if scope not in self._trees:
            self._trees[scope] = _parse(self._archive.sources.get(scope, ""))
        return self._trees[scope].get(last)

    def method(self, owner: Object, name: str) -> ast.FunctionDef | None:
        if owner.source:
            if id(owner) not in self._own:
                self._own[id(owner)] = _parse(owner.source)
            found = self._own[id(owner)].get(name)
            return found if isinstance(found, ast.FunctionDef) else None
        definition = self.named(owner.name)
        if isinstance(definition, ast.ClassDef):
            for item in definition.body:
                if isinstance(item, ast.FunctionDef) and item.name == name:
                    return item
        return None

    def forward(self, root: Object) -> ast.FunctionDef:
        # A scripted torch.nn.LSTM has overloads in its place: this one for tensors, another for packed sequences.
        found = self.method(root, "forward") or self.method(root, "forward__0")
        if found is None:
            raise Unreadable("no forward in the code")
        return found

    def attribute(self, owner: Object, name: str) -> Any:
        """The value that the file holds, or the constant that the class gives."""
        if name in owner.state:
            return owner.state[name]
        definition = self.named(owner.name) if owner.name else None
        for item in definition.body if isinstance(definition, ast.ClassDef) else ():
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id == name:
                return ast.literal_eval(item.value) if item.value is not None else None
        raise Unreadable(f"an attribute {name} that the file does not hold")


def _parse(text: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    if len(text) > _TEXT_LIMIT:
        raise Unreadable("more code than is read here")
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise Unreadable("code text that does not parse") from None
    return {item.name: item for item in tree.body if isinstance(item, (ast.ClassDef, ast.FunctionDef))}


class Budget:
    """Steps that are left for all evaluations of one file together."""

    def __init__(self) -> None:
        self.left = _TOTAL_STEP_LIMIT


class Evaluator:
    """One copy of a file's model, with state that its code may change from call to call.

    Args:
        zeroed: tensors of the file that are put to zero, such as a saved state.
    """

    def __init__(
        self, archive: Archive, definitions: Definitions, budget: Budget, zeroed: Sequence[Tensor] = ()
    ) -> None:
        self._archive, self._definitions, self._budget = archive, definitions, budget
        self._zeroed = {id(tensor) for tensor in zeroed}
        self._overlay: dict[tuple[int, str], Any] = {}  # attributes that code has set
        self._lifted: dict[int, Any] = {}  # of the file's values to ours
        self._bases: dict[int, Tensor] = {}  # of the file's storages to ours
        self._roots: dict[int, Tensor] = {}  # of our copies to the file's tensors
        self._nodes: dict[int, Node] = {}  # of tensors met in this call
        self._sharing: dict[int, list[Tensor]] = {}  # those tensors by storage
        self.written: dict[int, Tensor] = {}  # tensors of the file that code has changed, or set anew
        self.nodes: list[Node] = []  # of this call, in the order of their making

    def forward(self, *inputs: Any) -> Any:
        """Call the model; tensors, or pairs of them, in and a tensor or a nest of tuples and lists out.

        Raises:
            Unreadable: the code is damaged, or does what is not followed, or does not take these inputs.
        """
        self._steps, self._made, self._products = _STEP_LIMIT, _TOTAL_SIZE_LIMIT, _PRODUCT_LIMIT
        self._nodes, self._sharing, self.nodes = {}, {}, []
        root = self._archive.root
        try:
            function = self._definitions.forward(root)
            with torch.no_grad():
                return self._invoke(function, [root, *self._given(inputs)], {})
        except Unreadable:
            raise
        except (RecursionError, MemoryError):
            raise Unreadable("code nested too deep") from None
        except ODD as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise Unreadable(f"code that does not run on such input ({lines[0][:120]})") from None

    def node(self, tensor: Tensor) -> Node:
        if id(tensor) not in self._nodes:  # of the file, or held since an earlier call
            self._keep(tensor, Node("held", (), tensor, self._roots.get(id(tensor))))
        return self._nodes[id(tensor)]

    def _given(self, inputs: Sequence[Any]) -> list[Any]:
        given: list[Any] = []
        for value in inputs:
            if isinstance(value, tuple):
                given.append(tuple(self._given([None, *value])[1:]))
            elif isinstance(value, Tensor):
                tensor = value.clone()
                given.append(self._keep(tensor, Node("given" if given else "input", (), tensor)))
            else:
                given.append(value)
        return given

    def _keep(self, tensor: Tensor, node: Node) -> Tensor:
        self._nodes[id(tensor)] = node
        self._sharing.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self.nodes.append(node)
        return tensor

    def _count(self, work: int = 1) -> None:
        self._steps -= work
        self._budget.left -= work
        if min(self._steps, self._budget.left) < 0:
            raise Unreadable("more work than is done here")

    # Values of the file

    def _lift(self, value: Any) -> Any:
        """A value of the file for evaluation: its tensors copied, in float64, sharing memory where they share it."""
        if isinstance(value, (Object, str, int, float)) or value is None:
            return value
        if id(value) in self._lifted:
            return self._lifted[id(value)]
        self._count()
        made: Any
        if isinstance(value, Tensor):
            base = value if value._base is None else value._base
            if id(base) not in self._bases:
                self._bases[id(base)] = base.to(torch.float64 if base.is_floating_point() else base.dtype, copy=True)
            made = self._bases[id(base)].as_strided(value.shape, value.stride(), value.storage_offset())
            if id(value) in self._zeroed:
                made.zero_()
            self._roots[id(made)] = value
        elif isinstance(value, list):
            made = self._lifted[id(value)] = []
            made.extend(self._lift(item) for item in value)
        elif isinstance(value, tuple):
            made = tuple(self._lift(item) for item in value)
        elif isinstance(value, dict):
            made = self._lifted[id(value)] = {}
            made.update((key, self._lift(item)) for key, item in value.items())
        else:
            raise Unreadable("a value of an unknown kind")
        self._lifted[id(value)] = made
        return made

    def _attribute(self, owner: Any, name: str) -> Any:
        if not isinstance(owner, Object):
            raise Unreadable(f"the attribute {name} of a value")
        if (id(owner), name) in self._overlay:
            return self._overlay[id(owner), name]
        return self._lift(self._definitions.attribute(owner, name))

    # Statements

    def _invoke(self, function: ast.FunctionDef, args: Sequence[Any], keywords: dict[str, Any]) -> Any:
        parameters = [parameter.arg for parameter in function.args.args]
        if len(args) > len(parameters):
            raise Unreadable(f"{function.name} with {len(args)} arguments")
        scope = dict(zip(parameters, args, strict=False)) | keywords
        defaults = function.args.defaults
        for name, default in zip(parameters[len(parameters) - len(defaults) :], defaults, strict=True):
            if name not in scope:
                scope[name] = self._value(default, scope)
        returned = self._block(function.body, scope)
        return returned[0] if returned else None

    def _block(self, body: Sequence[ast.stmt], scope: dict[str, Any]) -> tuple[Any] | None:
        """Follow statements; a 1-tuple of what is returned, or None where nothing is."""
        for statement in body:
            self._count()
            returned = None
            if isinstance(statement, ast.Return):
                return (None if statement.value is None else self._value(statement.value, scope),)
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
                returned = self._block(
                    statement.body if self._truth(statement.test, scope) else statement.orelse, scope
                )
            elif isinstance(statement, ast.While):
                while returned is None and self._truth(statement.test, scope):
                    self._count()
                    returned = self._block(statement.body, scope)
            elif isinstance(statement, ast.For):
                returned = self._loop(statement, scope)
            elif isinstance(statement, ast.With):  # torch.no_grad and the like
                returned = self._block(statement.body, scope)
            elif not isinstance(statement, (ast.Pass, ast.Assert)):
                raise Unreadable(f"a statement {type(statement).__name__}")
            if returned is not None:
                return returned
        return None

    def _truth(self, tree: ast.expr, scope: dict[str, Any]) -> bool:
        value = self._value(tree, scope)
        if not isinstance(value, (bool, int, float)):
            raise Unreadable("a condition that is no truth value")
        return bool(value)

    def _loop(self, statement: ast.For, scope: dict[str, Any]) -> tuple[Any] | None:
        call = statement.iter
        items: Any
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "range":
            items = range(*(int(self._value(argument, scope)) for argument in call.args))
        else:
            items = self._value(call, scope)
            if not isinstance(items, (list, tuple)):
                raise Unreadable("a loop over something else than a range or a list")
        for item in items:
            self._count()
            self._assign(statement.target, item, scope)
            returned = self._block(statement.body, scope)
            if returned is not None:
                return returned
        return None

    def _assign(self, target: ast.expr, value: Any, scope: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            scope[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            if not isinstance(value, (list, tuple)) or len(value) != len(target.elts):
                raise Unreadable(f"{len(target.elts)} names for something else")
            for item, part in zip(target.elts, value, strict=True):
                self._assign(item, part, scope)
        elif isinstance(target, ast.Attribute):
            owner = self._value(target.value, scope)
            if not isinstance(owner, Object):
                raise Unreadable("an attribute set on a value")
            held = owner.state.get(target.attr)
            if isinstance(held, Tensor):
                self.written[id(held)] = held
            self._overlay[id(owner), target.attr] = value
        else:
            raise Unreadable("an assignment to a part of a value")

    # Expressions

    def _value(self, tree: ast.expr, scope: dict[str, Any]) -> Any:
        self._count()
        if isinstance(tree, ast.Constant):
            return tree.value
        if isinstance(tree, ast.Name):
            if tree.id in scope:
                return scope[tree.id]
            if tree.id in ("inf", "nan"):
                return float(tree.id)
            raise Unreadable(f"the name {tree.id}")
        if isinstance(tree, ast.Tuple):
            return tuple(self._value(item, scope) for item in tree.elts)
        if isinstance(tree, ast.List):
            return [self._value(item, scope) for item in tree.elts]
        if isinstance(tree, ast.Dict):
            return {
                self._value(k, scope): self._value(v, scope) for k, v in zip(tree.keys, tree.values, strict=True) if k
            }
        if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, (ast.USub, ast.Not)):
            return self._call(
                "neg" if isinstance(tree.op, ast.USub) else "__not__", [self._value(tree.operand, scope)], {}
            )
        if isinstance(tree, ast.IfExp):
            return self._value(tree.body if self._truth(tree.test, scope) else tree.orelse, scope)
        if isinstance(tree, ast.Subscript):
            return self._call("__getitem__", [self._value(tree.value, scope), self._value(tree.slice, scope)], {})
        if isinstance(tree, ast.Attribute):
            name = _dotted(tree, scope)
            if name is None:
                return self._attribute(self._value(tree.value, scope), tree.attr)
            if name.startswith("CONSTANTS.c"):
                return self._lift(self._archive.constants[int(name[11:])])
            return _Function(name)
        if isinstance(tree, ast.Call):
            return self._called(tree, scope)
        raise Unreadable(f"an expression {type(tree).__name__}")

    def _called(self, tree: ast.Call, scope: dict[str, Any]) -> Any:
        callee = tree.func
        name = _dotted(callee, scope)
        if name in ("annotate", "unchecked_cast"):
            return self._value(tree.args[1], scope)
        if name == "uninitialized":
            return None
        args = [self._value(item, scope) for item in tree.args]
        keywords = {item.arg: self._value(item.value, scope) for item in tree.keywords if item.arg}
        if name is None:
            if isinstance(callee, ast.Attribute):
                owner = self._value(callee.value, scope)
                function = self._definitions.method(owner, callee.attr) if isinstance(owner, Object) else None
                if function is None:
                    raise Unreadable(f"a call of {callee.attr}")
                return self._invoke(function, [owner, *args], keywords)
            target = self._value(callee, scope)
            if not isinstance(target, _Function):
                raise Unreadable("a call of a value")
            name = target.name
        if name == "getattr":
            return self._attribute(*args)
        if name.startswith("__torch__"):
            definition = self._definitions.named(name)
            if isinstance(definition, ast.FunctionDef):
                return self._invoke(definition, args, keywords)
            bases = definition.bases if isinstance(definition, ast.ClassDef) else []
            if [base.id for base in bases if isinstance(base, ast.Name)] == ["NamedTuple"]:
                return tuple(args)
            raise Unreadable(f"an object of the class {name}")
        if name.startswith("ops.cellstep."):
            raise Unreadable("an operator of cellstep")
        if name == "ops.prim.RaiseException":
            raise Unreadable("input that the code itself refuses")
        for prefix in ("torch.", "ops.aten.", "ops.prim."):
            name = name.removeprefix(prefix)
        return self._call(_ALIASES.get(name, name), args, keywords)

    # Operators

    def _call(self, name: str, args: list[Any], keywords: dict[str, Any]) -> Any:
        self._count()
        if args and isinstance(args[0], Tensor):
            if name == "size":
                return args[0].size(args[1]) if len(args) > 1 else list(args[0].shape)
            if name in ("dim", "numel", "len"):
                return {"dim": args[0].dim(), "numel": args[0].numel(), "len": len(args[0])}[name]
            if name in _ITEMS:
                number: Any = args[0].item()
                convert = _NUMBERS.get(name.removesuffix("Implicit"))
                return convert(number) if convert else number
            if name in ("dtype", "device", "layout"):
                return None
            if name in ("is_cuda", "is_floating_point", "requires_grad"):
                return name == "is_floating_point" and args[0].is_floating_point()
            if name in _CASTS:
                return self._cast(args, keywords)
            if name == "dropout" or name == "dropout_":
                return args[0]
        if name == "tensor":
            return self._made_tensor(args[0])
        if name == "NumToTensor":
            return self._made_tensor(*args)
        if not any(isinstance(arg, Tensor) for arg in args) or name == "__getitem__":
            found = self._on_numbers(name, args)
            if found is not NotImplemented:
                return found
        if name in ("_set_item", "__getitem__") and isinstance(args[0], dict) and not _is_plain(args[1]):
            raise Unreadable("a key that is neither text nor number")
        if name == "append":
            self._count(len(args[0]) // 64)
            args[0].append(args[1])
            return args[0]
        if name == "_set_item" and isinstance(args[0], (list, dict)):
            args[0][args[1]] = args[2]
            return args[0]
        if name in ("__is__", "__isnot__"):
            return (args[0] is args[1]) == (name == "__is__")
        if name.endswith("_") and name[:-1] in _IN_PLACE:
            return self._in_place(name, args, keywords)
        if name not in _ALLOWED:
            raise Unreadable(f"the operator {name}")
        return self._operator(name, args, keywords)

    def _on_numbers(self, name: str, args: list[Any]) -> Any:
        """Operators on numbers, text and lists; NotImplemented for others."""
        numbers = all(isinstance(arg, (bool, int, float)) for arg in args)
        if name in _NUMBERS and args:
            comparison = name in ("eq", "ne") and all(_is_plain(arg) or _is_flat(arg) for arg in args)
            lists = [arg for arg in args if isinstance(arg, (list, tuple, str))]
            if lists and name in ("add", "mul"):
                if (
                    name == "mul"
                    or sum(map(len, lists)) > _LIST_LIMIT
                    or not all(isinstance(arg, list) for arg in args)
                ):
                    raise Unreadable("a list or text out of the ordinary")
                self._count(sum(map(len, lists)))
            elif not numbers and not comparison:
                return NotImplemented
            result = _NUMBERS[name](*args)
            if type(result) is int and abs(result) >= 1 << 63:
                raise Unreadable("numbers out of the ordinary")
            return result
        if name in ("__is__", "__isnot__"):
            return (args[0] is None and args[1] is None) == (name == "__is__")
        if name in _ON_LISTS and isinstance(args[0], (list, tuple, dict, str)):
            self._count(len(args[0]) // 64)
            if name == "slice":
                return list(args[0])[slice(*[*args[1:], None, None][:3])]
            if name == "__contains__":
                return _is_flat(args[0]) and _is_plain(args[1]) and args[1] in args[0]
            if isinstance(args[0], dict) and not (
                _is_plain(args[1]) if name == "__getitem__" else name in ("len", "keys")
            ):
                raise Unreadable("a dictionary used in a way that is not followed")
            if name == "len":
                return len(args[0])
            return args[0][args[1]] if name == "__getitem__" else list(args[0])
        if name == "format":
            return args[0]
        if name in _SILENT:
            return None
        return NotImplemented

    def _made_tensor(self, numbers: Any) -> Tensor:
        if not (_is_plain(numbers) or _is_flat(numbers)) or isinstance(numbers, str):
            raise Unreadable("a tensor of something else than numbers")
        tensor = torch.tensor(numbers)
        tensor = tensor.double() if tensor.is_floating_point() else tensor
        return self._keep(tensor, Node("numbers", (), tensor))

    def _cast(self, args: list[Any], keywords: dict[str, Any]) -> Tensor:
        """Another type: floating-point types are all one here."""
        tensor: Tensor = args[0]
        codes = [value for value in (*args[1:], *keywords.values()) if type(value) is int]
        kind = _INTEGERS.get(codes[0]) if codes else None
        if kind is None or kind == tensor.dtype:
            if tensor.is_floating_point() or not codes:
                return tensor
            kind = torch.float64
        made = tensor.to(kind)
        return self._keep(made, Node("cast", (self.node(tensor),), made))

    def _operator(self, name: str, args: list[Any], keywords: dict[str, Any]) -> Any:
        self._count(10)
        if not all(isinstance(arg, Tensor) or _is_plain(arg) or _is_flat(arg) for arg in (*args, *keywords.values())):
            raise Unreadable(f"the operator {name} on lists of lists")
        keywords = {key: value for key, value in keywords.items() if key not in _ABOUT_PLACES and value is not None}
        if "dtype" in keywords:
            keywords["dtype"] = _INTEGERS.get(keywords["dtype"], torch.float64)
        elif name in _CREATORS and name != "arange" and not name.endswith("_like") and not name.startswith("new_"):
            keywords["dtype"] = torch.float64
        if name in ("softmax", "log_softmax", "cumsum"):
            args = args[:2]
        if name == "batch_norm":
            args = [*args[:5], False, *args[6:]]
        if name in ("lstm", "gru"):
            if len(args) != 9 or not isinstance(args[2], list):
                raise Unreadable("a packed sequence")
            args = [*args[:5], 0.0, False, *args[7:]]
        function = getattr(torch.ops.aten, name)
        self._measure(name, function, args, keywords)
        made = function(*args, **keywords)
        where = tuple(self._where(arg) for arg in (*args, *keywords.values()))
        if isinstance(made, Tensor):
            return self._keep(made, Node(name, where, made))
        node = Node(name, where, None)
        self.nodes.append(node)
        parts = [self._keep(part, Node("item", (node, k), part)) for k, part in enumerate(made)]
        return parts if isinstance(made, list) else tuple(parts)

    def _measure(self, name: str, function: Any, args: list[Any], keywords: dict[str, Any]) -> None:
        """Find out by a calculation without values how much an operator will make, and refuse too much."""
        tensors = list(_tensors(args))
        if any(tensor.numel() > 4 * _SIZE_LIMIT for tensor in tensors):
            raise Unreadable("a value larger than is computed here")
        if name in ("lstm", "gru"):
            steps = math.prod(args[0].shape[:-1]) if args[0].dim() > 1 else 1
            self._products -= steps * sum(weight.numel() for weight in args[2])
            made = steps * sum(weight.size(0) for weight in args[2])
        else:
            where = {"device": "meta"} if name in _CREATORS else {}
            shapes = function(*_on_meta(args), **{k: _on_meta(v) for k, v in keywords.items()}, **where)
            parts = [shapes] if isinstance(shapes, Tensor) else list(shapes)
            made = sum(part.numel() for part in parts)
            if name in _PRODUCTS or name.endswith("_cell"):
                self._products -= made * max(tensor.size(-1) if tensor.dim() else 1 for tensor in tensors)
                self._products -= made * max(tensor.size(0) if tensor.dim() else 1 for tensor in tensors)
        self._made -= made
        if made > _SIZE_LIMIT or min(self._made, self._products) < 0:
            raise Unreadable("more values than are computed here")

    def _where(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node(value)
        if isinstance(value, (list, tuple)):
            return tuple(self._where(item) for item in value)
        return value

    def _in_place(self, name: str, args: list[Any], keywords: dict[str, Any]) -> Any:
        """An operator that changes its first argument, and with it everything that shares its memory."""
        target = args[0]
        if not isinstance(target, Tensor):
            raise Unreadable("a list changed in place")
        where = tuple(self._where(arg) for arg in args)
        sharing = list(self._sharing[target.untyped_storage().data_ptr()])
        self._count(len(sharing))
        for tensor in sharing:
            node = self.node(tensor)
            if node.value is tensor:
                node.value = tensor.clone()
            if node.root is not None:
                self.written[id(node.root)] = node.root
        self._measure(name, getattr(torch.ops.aten, name), [torch.empty_like(target), *args[1:]], keywords)
        getattr(torch.ops.aten, name)(*args, **keywords)
        base = name[:-1]
        op, where = (
            ("clone", where[1:2]) if base == "copy" else ("numbers", ()) if base in ("zero", "fill") else (base, where)
        )
        new = Node(op, where, target.clone())
        self.nodes.append(new)
        for tensor in sharing:
            old = self.node(tensor)
            if tensor.numel() == target.numel() and tensor.data_ptr() == target.data_ptr():
                self._nodes[id(tensor)] = new
            elif not torch.equal(tensor, old.value):
                self._nodes[id(tensor)] = Node("changed in part", (old, new), tensor.clone())
        return target


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _is_flat(value: Any) -> bool:
    """Whether a value is a list without lists in it: nested ones can be longer than they look."""
    flat = isinstance(value, (list, tuple)) and len(value) <= _LIST_LIMIT
    return flat and all(isinstance(item, Tensor) or _is_plain(item) for item in value)


class _Function:
    """A name of the code that is called later."""

    def __init__(self, name: str) -> None:
        self.name = name


def _dotted(tree: ast.expr, scope: dict[str, Any]) -> str | None:
    """A name with dots that starts with no variable: torch.add, CONSTANTS.c0, __torch__.f."""
    parts = []
    while isinstance(tree, ast.Attribute):
        parts.append(tree.attr)
        tree = tree.value
    if not isinstance(tree, ast.Name) or tree.id in scope:
        return None
    return ".".join([tree.id, *reversed(parts)])


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(_on_meta(item) for item in value)
    return value
