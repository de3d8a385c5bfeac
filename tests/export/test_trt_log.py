"""What TensorRT says: its errors once, its words on sparsity in their three wordings, its inspector's JSON."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from obsdiff.errors import ObsdiffError
from obsdiff.export.trt_log import (
    Message,
    get_logger,
    inspector_layers,
    name_modules,
    node_modules,
    say_errors,
    sparsity_counts,
    sparsity_lines,
    start,
)

LayerInformationFormat = SimpleNamespace(JSON="json")  # the inspector looks for it beside the engine's class


def info(*texts: str) -> list[Message]:
    return [Message(3, text) for text in texts]


@pytest.mark.parametrize(
    ("lines", "eligible", "picked", "counts"),
    [
        (
            # TensorRT 10.3, NVIDIA/TensorRT issue 4056
            ["(Sparsity) Layers eligible for sparse math: MatMul_401, Conv_619 + Relu_620", "Timing Runner: a, b"],
            ["MatMul_401", "Conv_619 + Relu_620"],
            [],
            (2, None),
        ),
        (
            # TensorRT 8, issue 1403
            [
                "(Sparsity) Layers eligible for sparse math: Conv_0",
                "(Sparsity) TRT inference plan picked sparse implementation for layers:",
            ],
            ["Conv_0"],
            [],
            (1, 0),
        ),
        (
            [
                "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: node_MatMul_1, node_MatMul_2 + node_add_3",
                "(Sparsity) Chose 1 layer(s) using sparse tactics: node_MatMul_1",
            ],
            ["node_MatMul_1", "node_MatMul_2 + node_add_3"],
            ["node_MatMul_1"],
            (2, 1),
        ),
        (
            [
                "(Sparsity) Found 39 layer(s) eligible to use sparse tactics",
                "(Sparsity) Chose 0 layer(s) using sparse tactics",
            ],
            [],
            [],
            (39, 0),
        ),
        ([], [], [], (None, None)),
    ],
)
def test_sparsity_is_read_in_every_wording(
    lines: list[str], eligible: list[str], picked: list[str], counts: tuple[int | None, int | None]
) -> None:
    assert sparsity_lines(info(*lines)) == (eligible, picked)
    assert sparsity_counts(info(*lines)) == counts


def test_the_last_pass_counts_and_a_bare_count_does_not_forget_its_names() -> None:
    said = info(
        "(Sparsity) Chose 2 layer(s) using sparse tactics: a, b",
        "(Sparsity) Chose 1 layer(s) using sparse tactics: b",
        "(Sparsity) Chose 1 layer(s) using sparse tactics",
    )
    assert sparsity_lines(said)[1] == ["b"]


def test_errors_are_said_once_in_order_and_without_the_librarys_own_files() -> None:
    wanted = "Myelin (Cannot compile operation 'node_MatMul_109' for Turing (SM75): FP32 GEMM is not supported.)"
    error = (
        "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:337: check_turing_op_compatibility] Cannot "
        "compile operation 'node_MatMul_109' for Turing (SM75): FP32 GEMM is not supported. In compileGraph at "
        "/_src/optimizer/myelin/codeGenerator.cpp:2012)"
    )
    messages = [Message(2, "a warning"), Message(1, error), Message(1, error), Message(1, "then\nthis.")]
    assert say_errors(messages) == f"{wanted}; then this"
    assert say_errors([Message(2, "a warning"), *info("(Sparsity) Chose 0")]) == "a warning"
    assert say_errors([]) == "it does not say why"
    assert len(say_errors([Message(1, "long " * 400)])) == 400


def test_a_logger_keeps_what_matters_and_there_is_one() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = get_logger(trt)
    assert logger is get_logger(trt)
    logger.messages.clear()
    for severity, text in ((4, "noise"), (4, "(Sparsity) Chose 0 layer(s) using sparse tactics"), (1, "bad")):
        logger.log(trt.ILogger.Severity(severity), text)
    assert [message.severity for message in logger.messages] == [4, 1]


def test_what_does_not_start_says_why() -> None:
    logger = SimpleNamespace(messages=[])

    def refuse(logger: Any) -> None:
        logger.messages.append(Message(1, "createInferBuilder: Error Code 6: CUDA failure 35"))
        raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(ObsdiffError, match=r"^TensorRT does not start: CUDA failure 35$"):
        start(refuse, logger, "TensorRT")


class Engine:
    def __init__(self, text: str):
        self.text = text

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda kind: {"json": self.text}[kind])


def test_the_inspector_gives_dicts_whatever_the_verbosity() -> None:
    assert inspector_layers(Engine('{"Layers": [{"Name": "a", "TacticName": "t"}], "Bindings": []}')) == [
        {"Name": "a", "TacticName": "t"}
    ]
    assert inspector_layers(Engine('{"Layers": ["a", "b"]}')) == [{"Name": "a"}, {"Name": "b"}]
    assert inspector_layers(Engine('{"Layers": [')) == inspector_layers(Engine("[]")) == []


def test_nodes_are_known_by_their_modules(one_block_bundle: Path) -> None:
    graph = one_block_bundle / "denoiser" / "model.onnx"
    modules = node_modules(graph)
    (query,) = {node for node, name in modules.items() if name.endswith(".0.attn.to_q") and "MatMul" in node}
    assert modules[query] == "transformer_blocks.0.attn.to_q"
    assert name_modules(f"cannot '{query}'", graph) == f"cannot '{query}'; {query} is of the module {modules[query]}"
    assert name_modules("cannot", graph) == "cannot"
