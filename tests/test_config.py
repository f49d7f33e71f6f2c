# SPDX-License-Identifier: Apache-2.0
"""Settings that cannot work are refused, with the value and the rule."""

import math

import pytest
import small


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 0.0}, ["alpha=0.0", "above 0"]),
        ({"alpha": -1.0}, ["alpha=-1.0", "above 0"]),
        ({"alpha": math.nan}, ["alpha=nan", "above 0"]),
        ({"alpha": math.inf}, ["alpha=inf", "finite"]),
        ({"invariance_threshold": -1.0}, ["invariance_threshold=-1.0", "0 or more"]),
        ({"invariance_threshold": math.nan}, ["invariance_threshold=nan", "not NaN"]),
        ({"invariance_distance": "root"}, ["invariance_distance='root'", "rationale", "divergence"]),
        ({"rationale_reduction": "sum"}, ["rationale_reduction='sum'", "mean", "pair"]),
        ({"per_device_pair_batch_size": 0}, ["per_device_pair_batch_size=0", "1 or more"]),
        ({"pair_chunk_size": 0}, ["pair_chunk_size=0", "1 or more, or None"]),
        ({"random_crop_scale": 0.0}, ["random_crop_scale=0.0", "(0, 1]"]),
        ({"max_loss_scale": 0}, ["max_loss_scale=0", "above 0"]),
        ({"correction_interval": 0}, ["correction_interval=0", "1 or more"]),
        ({"correction_schedule": "never"}, ["correction_schedule='never'", "always", "violated"]),
        ({"correction_schedule": "violated", "invariance_threshold": math.inf}, ["never correct", "finite"]),
        ({"layer_lr_decay": 0.0}, ["layer_lr_decay=0.0", "(0, 1]"]),
        ({"layer_lr_decay": 1.1}, ["layer_lr_decay=1.1", "(0, 1]"]),
        ({"head_learning_rate": 0.0}, ["head_learning_rate=0.0", "above 0"]),
        ({"head_learning_rate": math.inf}, ["head_learning_rate=inf", "finite"]),
        *(({"layer_lr_decay": 0.5, "optim": optim}, [f"optim='{optim}'"]) for optim in ("lomo", "galore_adamw")),
        ({"head_learning_rate": 0.1, "optim": "apollo_adamw"}, ["optim='apollo_adamw'", "leave the two out"]),
        ({"objective": "dro"}, ["objective='dro'", "erm", "group_dro"]),
        ({"group_dro_step_size": -1}, ["group_dro_step_size=-1", "0 or more"]),
        *(
            ({"corrective_layers": layers}, ["corrective_layers=", "None or a list of regular expressions"])
            for layers in ([], "classifier", ["("], [""], [3])
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_work(tmp_path, settings, words):
    with pytest.raises(ValueError) as error:
        small.config(tmp_path, **settings)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_threshold_of_zero_and_an_infinite_one_are_settings(tmp_path):
    for threshold in (0.0, math.inf):
        assert small.config(tmp_path, invariance_threshold=threshold).invariance_threshold == threshold
