"""Scaling factors that a preceding layer takes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from calibration_support import batches_of, linears, visited
from tests_support import folder_of

from compress.calibration.input_factors import scale_inputs
from compress.calibration.inputs import Inputs
from compress.models.network.build import load_network
from compress.models.network.segments import Parts, Segment, segments_of


@pytest.mark.parametrize(
    ("kind", "leader", "absorbed"),
    [
        ("mistral", "self_attn.q_proj", True),  # by the norm before
        ("mistral", "mlp.gate_proj", True),
        ("mistral", "mlp.down_proj", True),  # by up_proj
        ("mistral", "self_attn.o_proj", False),  # two query heads share a value head
        ("bert", "attention.self.query", False),  # the residual reads the norm too
        ("bert", "attention.output.dense", True),  # by value
        ("bert", "intermediate.dense", False),
        ("bert", "output.dense", False),  # behind GELU
        ("gemma3_text", "self_attn.q_proj", False),  # its norm multiplies by one plus the weight
    ],
)
def test_a_factor_goes_where_nothing_else_notices(make_model, kind: str, leader: str, absorbed: bool) -> None:
    folder = make_model(kind)
    texts = batches_of(folder)
    done = []

    def visit(_: Segment, parts: Parts, inputs: Inputs) -> None:
        layers = linears(parts)
        groups = inputs.see(parts, layers, lambda *_: None)
        names = next(names for names in groups.values() if leader in [re.sub(r"^.*?\.\d+\.", "", name) for name in names])
        before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        exact = inputs.sample(parts)
        factor = torch.from_numpy(np.random.default_rng(0).uniform(0.2, 5, layers[names[0]].in_features)).float()
        left = scale_inputs(parts, inputs, [layers[name] for name in names], factor)
        torch.testing.assert_close(inputs.sample(parts), exact, rtol=1e-3, atol=1e-4)
        done.append(left is None)
        for name in names:
            scaled = before[name] * (factor if left is None else 1)
            torch.testing.assert_close(layers[name].weight.detach(), scaled, rtol=1e-4, atol=1e-6)
        assert left is None or torch.equal(left, factor)

    visited(folder, texts, visit)
    assert done == [absorbed] * len(segments_of(load_network(folder_of(folder), torch.float32))[1 : -1 if kind != "bert" else None])
