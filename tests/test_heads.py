# SPDX-License-Identifier: Apache-2.0
"""`find_head` and `ClassifierHead` on tiny models of many architectures."""

import copy
import pickle
from types import MethodType, SimpleNamespace

import pytest
import timm
import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from small import SIZE, resnet, vit
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from ipg_hf import find_head, load_image_classifier
from ipg_hf.inference import inference

LABELS = 7
TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 4,
}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
WINDOWS = {"image_size": SIZE, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
# class, config, path of the head, width of z
TRANSFORMERS = [
    ("ViT", TRANSFORMER, "classifier", 32),
    ("DeiT", TRANSFORMER, "classifier", 32),
    ("Beit", TRANSFORMER, "classifier", 32),
    ("Swin", WINDOWS, "classifier", 16),
    ("ConvNext", STAGES, "classifier", 16),
    ("ResNet", {**STAGES, "embedding_size": 8, "layer_type": "basic"}, "classifier.1", 16),
    ("Dinov2", TRANSFORMER, "classifier", 64),  # z is the class token beside the mean of the patches
]
CONV_HEAD = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_chs": 8}
DISTILLED = {"img_size": SIZE, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1}
# name, other arguments, path of the head
TIMM = [
    ("test_resnet", {}, "timm_model.fc"),
    ("test_vit", {"img_size": 32}, "timm_model.head"),
    ("test_efficientnet", {}, "timm_model.classifier"),
    ("resnetv2_18", CONV_HEAD, "timm_model.head.fc"),
]


def huggingface(name, config, num_labels=LABELS, suffix="ForImageClassification"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**config, num_labels=num_labels)
    return getattr(transformers, f"{name}{suffix}")(config)


def timm_module(name, num_classes=LABELS, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=num_classes, **kwargs)


def images(model, size=None, n=3):
    size = size or getattr(model.config, "image_size", None) or 32
    generator = torch.Generator().manual_seed(1)
    parameter = next(model.parameters())
    return {"pixel_values": torch.randn(n, 3, size, size, generator=generator).to(parameter.dtype)}


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Classifier(nn.Module):
    """A module like a transformers classifier: one layer for features, then what each test makes of it."""

    def __init__(self, forward, num_labels=4, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_labels=num_labels, image_size=4)
        self.features = nn.Linear(48, 8)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.compute = forward

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.compute(self, self.features(pixel_values.flatten(1)).relu()))


def check_head(model, path, inputs):
    """Everything that is true of a head, on one model in float64."""
    model = model.double().eval()
    inputs = {name: values.double() for name, values in inputs.items()}
    head = find_head(model)
    assert head.path == path
    assert head.modules == (model.get_submodule(path),)
    head.verify(model, inputs)
    logits, z = head.run(model, inputs)
    assert torch.equal(logits, model(**inputs).logits)
    assert logits.shape == (len(z), LABELS) and z.dim() == 2 and head.weight.shape == (LABELS, z.shape[1])
    torch.testing.assert_close(logits, z @ head.weight.T + head.bias, rtol=0, atol=1e-10)

    (weight_gradient,) = torch.autograd.grad(logits[:, 0].sum(), head.modules[0].weight, retain_graph=True)
    torch.testing.assert_close(weight_gradient.flatten(1)[0], z.sum(0))
    (from_view,) = torch.autograd.grad((head.weight * 3).sum(), head.modules[0].weight)
    assert from_view.eq(3).all()  # `weight` is a view of the parameter
    z.sum().backward()
    assert next(model.parameters()).grad is not None  # z is attached to the network
    assert hooks(model) == 0
    return z


@pytest.mark.parametrize(("name", "config", "path", "width"), TRANSFORMERS, ids=[row[0] for row in TRANSFORMERS])
def test_transformers_architectures(name, config, path, width):
    model = huggingface(name, config)
    assert check_head(model, path, images(model)).shape == (3, width)


@pytest.mark.parametrize(("name", "kwargs", "path"), TIMM, ids=[row[0] for row in TIMM])
def test_timm_architectures(name, kwargs, path):
    module = timm_module(name, **kwargs)
    model = load_image_classifier(module, model_args=kwargs)
    check_head(model, path, images(model))
    assert isinstance(model, PreTrainedModel) and model.timm_model is module
    is_convolution = isinstance(find_head(model).modules[0], nn.Conv2d)
    assert is_convolution == (name == "resnetv2_18")


@pytest.mark.parametrize(
    ("model", "paths"),
    [
        (
            lambda: huggingface("DeiT", TRANSFORMER, suffix="ForImageClassificationWithTeacher"),
            ["cls_classifier", "distillation_classifier"],
        ),
        (
            lambda: load_image_classifier(
                timm_module("deit_tiny_distilled_patch16_224", **DISTILLED), model_args=DISTILLED
            ),
            ["timm_model.head", "timm_model.head_dist"],
        ),
    ],
    ids=["transformers", "timm"],
)
@pytest.mark.parametrize("zero", [False, True])
def test_the_mean_of_two_heads(model, paths, zero):
    model = model().double().eval()
    for path in paths if zero else []:  # the outputs of both are then equal to the logits
        nn.init.zeros_(model.get_submodule(path).weight)
        nn.init.zeros_(model.get_submodule(path).bias)
    inputs = images(model, SIZE)
    head = find_head(model)
    assert head.path == tuple(paths) and head.kind == "mean of 2 linear"
    head.verify(model, inputs)
    logits, z = head.run(model, inputs)
    assert torch.equal(logits, model(**inputs).logits) and logits.any() != zero
    parts = [model.get_submodule(path) for path in paths]
    assert torch.equal(head.weight, torch.cat([part.weight / 2 for part in parts], 1))
    torch.testing.assert_close(logits, z @ head.weight.T + head.bias, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(head.weight.sum(), [part.weight for part in parts])
    assert all(gradient.eq(0.5).all() for gradient in gradients)
    again = find_head(model, head.path)
    assert again.modules == head.modules
    # one of the two alone, or beside a stranger, is refused
    for wrong, problem in ((paths[0], "other layers too"), (paths[1], "other layers too")):
        with pytest.raises(ValueError, match=f"{problem}.*a tuple of paths") as error:
            find_head(model, wrong).verify(model, inputs)
        assert f"same width: {paths[1 - paths.index(wrong)]!r}" in str(error.value)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("forward", "accepted"),
    [
        (lambda self, z: (self.first(z) + self.second(z)) / 2, True),
        (lambda self, z: torch.stack([self.first(z), self.second(z)]).mean(0), True),
        (lambda self, z: self.first(z) + self.second(z), False),
        (lambda self, z: 0.4 * self.first(z) + 0.6 * self.second(z), False),
        (lambda self, z: torch.maximum(self.first(z), self.second(z)), False),
        (lambda self, z: (self.first(z) + self.second(z) + 0.01 * self.features.bias[:4]) / 2, False),
    ],
    ids=["mean", "stacked", "sum", "weighted", "maximum", "more"],
)
def test_only_the_mean_is_accepted(forward, accepted):
    model = Classifier(forward, first=nn.Linear(8, 4), second=nn.Linear(8, 4))
    if accepted:
        head = find_head(model)
        head.verify(model, images(model))
        logits, z = head.run(model, images(model))
        torch.testing.assert_close(logits, z @ head.weight.T + head.bias)
    else:
        with pytest.raises(ValueError, match=r"They do not make the logits: the logits (are not the mean|depend on)"):
            find_head(model)
        with pytest.raises(ValueError, match="'first' and 'second' is not this model's classifier head"):
            find_head(model, ("first", "second")).verify(model, images(model))


def test_heads_of_which_some_have_no_bias():
    model = Classifier(
        lambda self, z: (self.first(z) + self.second(z[:, :5])) / 2,
        first=nn.Linear(8, 4),
        second=nn.Linear(5, 4, bias=False),
    )
    head = find_head(model)
    logits, z = head.run(model, images(model))
    assert z.shape[1] == head.weight.shape[1] == 13 and torch.equal(head.bias, model.first.bias / 2)
    torch.testing.assert_close(logits, z @ head.weight.T + head.bias)


def test_hidden_layers_as_wide_as_the_labels():
    # feed-forward layers of 64 and hidden layers of 32 outputs: candidates of the same width as the head
    for num_labels in (32, 64):
        model = vit(num_labels=num_labels)
        same_width = [name for name, m in model.named_modules() if getattr(m, "out_features", None) == num_labels]
        assert len(same_width) > 2
        assert find_head(model).path == "classifier"


def test_the_last_registered_layer_is_not_always_the_head():
    def forward(self, z):
        self.auxiliary(z)
        return self.first(z)

    model = Classifier(forward, first=nn.Linear(8, 4), auxiliary=nn.Linear(8, 4))
    assert find_head(model).path == "first"
    # where the noise forward cannot decide, nothing is guessed
    model.compute = lambda self, z: self.first(z).add_(self.auxiliary(z))
    with pytest.raises(ValueError, match="They do not make the logits: the logits are not the mean of their outputs"):
        find_head(model)
    model.compute = lambda self, z: z[:, :4]
    with pytest.raises(ValueError, match="the output of none of them reaches the logits"):
        find_head(model)


def test_head_by_path():
    model = resnet(LABELS)
    assert find_head(model, "classifier.1").modules[0] is model.classifier[1]
    with pytest.raises(ValueError, match=r"no layer of ResNetForImageClassification.*'classifier\.1'"):
        find_head(model, "clasifier.1")
    with pytest.raises(ValueError, match=r"is a Sequential, not a linear layer\. Did you mean 'classifier\.1'\?"):
        find_head(model, "classifier")
    with pytest.raises(ValueError, match=r"is a Flatten, not a linear layer\.$"):
        find_head(model, "classifier.0")
    with pytest.raises(ValueError, match=r"Did you mean 'classifier\.1'\?"):
        find_head(model, "")
    with pytest.raises(ValueError, match="not a linear layer"):  # a 3×3 convolution
        find_head(model, "resnet.embedder.embedder.convolution")


def test_no_candidate_names_the_last_linear_layers():
    model = vit(num_labels=LABELS)
    model.classifier = nn.Identity()
    with pytest.raises(ValueError, match=r"no linear layer with 7 outputs.*layers\.1"):
        find_head(model)


@pytest.mark.parametrize(
    ("forward", "problem"),
    [
        (lambda self, z: self.head(z.unsqueeze(1).expand(-1, 5, -1)).mean(1), "applied before pooling"),
        (lambda self, z: self.head(z) + 0 * self.head(z), "ran 2 times"),
        (lambda self, z: nn.functional.linear(z, self.head.weight), "ran 0 times"),
        (lambda self, z: self.head(z) / 2, "output is not the logits"),
        (lambda self, z: self.head(z).softmax(-1), "output is not the logits"),
        (lambda self, z: self.head(z).mul_(2), "output is not the logits"),
        (lambda self, z: self.head(z) + 1e-3, "output is not the logits"),
        (lambda self, z: self.head(z) + 0.1 * z[:, :4], "the logits depend on other layers too .*features"),
        (lambda self, z: self.head(z)[:, :2], "its output has the shape"),
    ],
    ids=["before pooling", "twice", "not at all", "halved", "softmax", "in place", "offset", "skip", "cut"],
)
def test_verify_rejects(forward, problem):
    model = Classifier(forward, head=nn.Linear(8, 4))
    inputs = images(model)
    head = find_head(model, "head")
    with pytest.raises(ValueError, match=f"'head' is not this model's classifier head.*{problem}"):
        head.verify(model, inputs)
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("forward", "problem"),
    [
        (lambda self, z: self.head(z.unsqueeze(1).expand(-1, 5, -1)).mean(1), "before pooling.*\\(3, 5, 8\\)"),
        (lambda self, z: self.head(z) + self.head(z), "ran 2 times in one forward"),
        (lambda self, z: nn.functional.linear(z, self.head.weight), "ran 0 times in one forward"),
    ],
    ids=["before pooling", "twice", "not at all"],
)
def test_run_rejects(forward, problem):
    model = Classifier(forward, head=nn.Linear(8, 4))
    with pytest.raises(RuntimeError, match=problem):
        find_head(model, "head").run(model, images(model))
    assert hooks(model) == 0


@pytest.mark.parametrize("trained", [True, False])
def test_a_second_way_to_the_logits_that_starts_at_zero(trained):
    """No number shows it before training; where it is frozen at zero it never will be one."""
    model = Classifier(lambda self, z: self.head(z) + self.adapter(z), head=nn.Linear(8, 4))
    model.adapter = nn.Linear(8, 4, bias=False)
    nn.init.zeros_(model.adapter.weight).requires_grad_(trained)
    if trained:
        with pytest.raises(ValueError, match=r"the logits depend on other layers too .*'adapter\.weight'"):
            find_head(model, "head").verify(model, images(model))
    else:
        find_head(model, "head").verify(model, images(model))


def test_a_layer_that_adds_to_w_z_is_rejected():
    class Adapted(nn.Linear):
        def forward(self, z):
            return super().forward(z) + 0.01 * z[:, :1]

    model = Classifier(lambda self, z: self.head(z), head=Adapted(8, 4))
    with pytest.raises(ValueError, match="W z \\+ b differs"):
        find_head(model).verify(model, images(model))


def test_accepted_shapes_of_z_and_calls_by_keyword():
    for forward, layer in (
        (lambda self, z: self.head(z.unsqueeze(1)).squeeze(1), nn.Linear(8, 4)),
        (lambda self, z: self.head(input=z), nn.Linear(8, 4, bias=False)),
        (lambda self, z: self.head(z[..., None, None]).flatten(1), nn.Conv2d(8, 4, 1)),
    ):
        model = Classifier(forward, head=layer)
        head = find_head(model)
        head.verify(model, images(model))
        logits, z = head.run(model, images(model))
        bias = 0 if head.bias is None else head.bias
        torch.testing.assert_close(logits, z @ head.weight.T + bias)


def test_a_model_without_logits_is_named():
    model = Classifier(lambda self, z: z, head=nn.Linear(8, 4))
    model.forward = lambda pixel_values: {"last_hidden_state": pixel_values}
    with pytest.raises(ValueError, match="has no logits, only \\['last_hidden_state'\\]"):
        find_head(model).run(model, images(model))


def test_a_replaced_head_is_noticed():
    module = timm_module("test_resnet")
    model = load_image_classifier(module)
    head = find_head(model)
    module.reset_classifier(LABELS)
    with pytest.raises(RuntimeError, match=r"ran 0 times.*find the head anew"):
        head.run(model, images(model))
    with pytest.raises(ValueError, match="ran 0 times"):
        head.verify(model, images(model))
    find_head(model).verify(model, images(model))


def test_hooks_leave_no_trace_even_after_an_exception():
    model = vit(num_labels=32)  # several candidates: hooks on all of them
    head = find_head(model)
    head.verify(model, images(model))
    head.run(model, images(model))
    with pytest.raises(ValueError, match="64"):
        head.run(model, images(model, 64))
    with pytest.raises(ValueError, match="64"):
        head.verify(model, images(model, 64))
    model.config.image_size = 64  # the noise does not fit
    with pytest.raises(ValueError, match="Trying them out on noise failed"):
        find_head(model)
    assert hooks(model) == 0
    assert model.training

    twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, loaded):
        assert hooks(other) == 0
        expected = find_head(model, "classifier").run(model.eval(), images(model, SIZE))
        ours = find_head(other, "classifier").run(other.eval(), images(model, SIZE))
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_searching_draws_nothing_and_changes_nothing():
    model = vit(num_labels=32, dropout=0.5)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    head = find_head(model)
    head.verify(model, images(model))
    nn.init.zeros_(head.modules[0].weight)
    nn.init.zeros_(head.modules[0].bias)
    head.verify(model, images(model))  # all-zero logits are tried out on noise
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(values, before[name]) for name, values in model.state_dict().items() if "classifier" not in name
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inference_restores_every_mode():
    model = resnet()
    frozen = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)][::2]
    model.train()
    for module in frozen:
        module.eval()
    modes = [module.training for module in model.modules()]
    assert True in modes and False in modes
    with inference(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyError), inference(model):
        raise KeyError
    assert [module.training for module in model.modules()] == modes


def in_bfloat16(model):
    return model.bfloat16()


def in_autocast(model):
    """As Accelerate prepares a model: the forward in autocast, its outputs in float32."""
    forward = torch.autocast("cpu", torch.bfloat16)(type(model).forward)
    model.forward = MethodType(convert_outputs_to_fp32(forward), model)
    return model


@pytest.mark.parametrize("precision", [in_bfloat16, in_autocast])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("build", [vit, resnet, lambda n: load_image_classifier(timm_module("test_vit", n))])
def test_low_precision_gives_no_false_alarm(build, zero, precision):
    model = build(4)
    head = find_head(model)
    if zero:  # zero-initialised heads are what several timm models start from
        nn.init.zeros_(head.modules[0].weight)
        nn.init.zeros_(head.modules[0].bias)
    model = precision(model)
    head.verify(model, images(model, None if build is vit else 160, n=16))
    assert head.run(model, images(model, None if build is vit else 160))[0].any() != zero


def test_low_precision_still_sees_a_wrong_head():
    for precision in (in_bfloat16, in_autocast):
        model = precision(Classifier(lambda self, z: self.head(z) * 1.25, head=nn.Linear(8, 4)))
        with pytest.raises(ValueError, match="its output is not the logits"):
            find_head(model).verify(model, images(model))


@pytest.mark.parametrize("shared", [True, False])
def test_zero_initialised_head(shared):
    model = Classifier(lambda self, z: self.head(z) if shared else self.head(z).clone(), head=nn.Linear(8, 4))
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    find_head(model).verify(model, images(model))
    # zeros agree with other zeros: a layer whose output does not reach the logits stays none
    model.compute = lambda self, z: (self.head(z), z.new_zeros(len(z), 4))[1]
    with pytest.raises(ValueError, match="its output is not the logits"):
        find_head(model).verify(model, images(model))
    assert hooks(model) == 0


def test_models_without_config():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    assert find_head(model).path == "1"
    head = find_head(nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 4)), "3")
    assert head.weight.shape == (4, 8)
    with pytest.raises(ValueError, match=r"several linear layers: '1', '2'.*no config.*head="):
        find_head(nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Linear(8, 4)))
    assert find_head(timm_module("test_resnet")).path == "fc"  # by `num_classes`
