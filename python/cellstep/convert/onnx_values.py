"""What in an ONNX graph is constant, and what value it has."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstep.convert.parts import Array

if TYPE_CHECKING:
    import onnx

_RANDOM = (
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)


class Scope:
    """A graph, or the body of a node, and the graphs around it."""

    def __init__(
        self, graph: "onnx.GraphProto", around: "Scope | None", model: "onnx.ModelProto", given: Mapping[str, Array]
    ) -> None:
        self.graph = graph
        self.around = around
        self._model = model
        self.producers: dict[str, onnx.NodeProto] = {}
        self.inputs = {value.name for value in graph.input}
        self._values: dict[str, Array] = {name: np.asarray(value) for name, value in given.items()}
        self._initializers = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in given}
        self._constant = {*self._values, *self._initializers}

    def add(self, node: "onnx.NodeProto") -> None:
        """The next node, in the order of the graph."""
        self.producers |= {name: node for name in node.output if name}
        body = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
        if not body and node.op_type not in _RANDOM and all(self.constant(name) for name in node.input if name):
            self._constant.update(node.output)

    def constant(self, name: str) -> bool:
        scope = self._where(name)
        return scope is not None and name in scope._constant

    def producer(self, name: str) -> "onnx.NodeProto | None":
        scope = self._where(name)
        return None if scope is None else scope.producers.get(name)

    def value(self, name: str) -> Array | None:
        """The value of a constant; None for what is none.

        Raises:
            ValueError: it cannot be computed.
        """
        scope = self._where(name)
        if scope is None or name not in scope._constant:
            return None
        if name not in scope._values:
            scope._values[name] = scope._evaluated(name)
        return scope._values[name]

    def value_for_any_batch(self, name: str) -> Array | None:
        """As :meth:`value`, and of what is expanded to the batch the value before."""
        while not self.constant(name):
            node = self.producer(name)
            if node is None or node.op_type not in ("Expand", "Tile", "Identity"):
                return None
            name = node.input[0]
        return self.value(name)

    def _where(self, name: str) -> "Scope | None":
        scope: Scope | None = self
        while scope is not None and not (name in scope._constant or name in scope.producers or name in scope.inputs):
            scope = scope.around
        return scope

    def _evaluated(self, name: str) -> Array:
        from onnx import TensorProto, helper, numpy_helper
        from onnx.reference import ReferenceEvaluator

        if name in self._initializers:
            return numpy_helper.to_array(self._initializers[name])
        node = self.producers[name]
        sources = list(dict.fromkeys(source for source in node.input if source))
        outputs = [output for output in node.output if output]

        def values(names: list[str]) -> list[Any]:
            return [helper.make_tensor_value_info(each, TensorProto.UNDEFINED, None) for each in names]

        graph = helper.make_graph([node], "constant", values(sources), values(outputs))
        model = helper.make_model(graph, opset_imports=self._model.opset_import)
        answer = ReferenceEvaluator(model).run(None, {source: self.value(source) for source in sources})
        self._values |= {output: np.asarray(value) for output, value in zip(outputs, answer, strict=True)}
        return self._values[name]


def scopes(model: "onnx.ModelProto", given: Mapping[str, Array]) -> Iterator[Scope]:
    """The graph of a model and the bodies in it."""

    def walk(graph: "onnx.GraphProto", around: Scope | None, known: Mapping[str, Array]) -> Iterator[Scope]:
        scope = Scope(graph, around, model, known)
        bodies = []
        for node in graph.node:
            scope.add(node)
            for attribute in node.attribute:
                bodies += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
        yield scope
        for body in bodies:
            yield from walk(body, scope, {})

    return walk(model.graph, None, given)
