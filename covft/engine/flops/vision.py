"""Counters of the vision encoder and of what the fine-tuning methods put into it, for one image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from covft.engine.flops.tally import Flops, Stream, Tally, count, counts, low_rank, size
from covft.models.projectors import LinearProjector, MLPProjector, PixelShuffleProjector, Projector
from covft.models.vision.tower import VisionTower
from covft.models.vision.vit import MLP, Attention, Block, ViT
from covft.vft.comoe import CoMoE
from covft.vft.cve import CVE, ResidualBlock
from covft.vft.lora import LoRALinear
from covft.vft.q_moe import QMoEConnector, QMoELayer, QueryAttention
from covft.vft.qa_vit import QuestionAwareAttention
from covft.vft.router import RandomRouter, Router
from covft.vft.svpt import ConnectedBlock
from covft.vft.vpt import PromptedBlock


@dataclass(frozen=True)
class TowerFlops:
    """The vision tower's operations for one image.

    Attributes:
        flops: The operations.
        features_need_grad: Whether something trains in the tower.
        depends_on_text: Whether they grow with the instruction's length.
    """

    flops: Flops
    features_need_grad: bool
    depends_on_text: bool


def tower_flops(tower: VisionTower, *, text_tokens: int) -> TowerFlops:
    """Count the encoder, with its connector, for one image in the tower's present mode.

    Args:
        tower: The tower.
        text_tokens: Tokens of the image's instruction.

    Raises:
        ValueError: If a module or a parameter isn't known.
    """
    tally = Tally(text_tokens=text_tokens)
    x = count(tally, tower.backbone, Stream(1, False))
    if tower.connector is not None:
        x = count(tally, tower.connector, x)
    tally.check_complete(tower, where="the vision tower")
    return TowerFlops(tally.flops, x.grad, tally.read_text)


def projector_flops(projector: Projector, *, features_need_grad: bool) -> tuple[Flops, bool]:
    """Count the projector for one image; return also whether its output's gradient is needed."""
    tally = Tally()
    # A projector's rows are the tokens that it gives: pixel shuffle comes before its products.
    x = count(tally, projector, Stream(projector.num_tokens, features_need_grad))
    tally.check_complete(projector, where="the projector")
    return tally.flops, x.grad


@counts(LinearProjector)
def _linear_projector(tally: Tally, module: LinearProjector, x: Stream) -> Stream:
    return count(tally, module.linear, x)


@counts(MLPProjector, PixelShuffleProjector)
def _layered_projector(tally: Tally, module: Any, x: Stream) -> Stream:
    return count(tally, module.layers, x)


@counts(ViT)
def _vit(tally: Tally, vit: ViT, x: Stream) -> Stream:
    config = vit.config
    patch = vit.patch_embed
    grad = tally.product(
        config.grid**2,
        3 * config.patch_size**2,
        config.hidden_dim,
        left=x.grad,
        right=tally.uses(patch.weight),
    )
    grad |= tally.uses(patch.bias, vit.cls_token, vit.register_tokens, vit.pos_embed)
    x = Stream(config.num_prefix + config.grid**2, grad)
    for part in (vit.pre_norm, *vit.blocks):
        x = count(tally, part, x)
    return replace(count(tally, vit.final_norm, x), rows=config.grid**2)


@counts(Block)
def _block(tally: Tally, block: Block, x: Stream) -> Stream:
    for parts in ((block.norm1, block.attn, block.ls1), (block.norm2, block.mlp, block.ls2)):
        branch = x
        for part in parts:
            branch = count(tally, part, branch)
        x = x.after(branch.grad)
    return x


@counts(Attention)
def _attention(tally: Tally, attn: Attention, x: Stream) -> Stream:
    query, key, value = (count(tally, part, x) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
    return count(tally, attn.out_proj, tally.attention(_width(attn), query, key, value))


@counts(MLP)
def _mlp(tally: Tally, mlp: MLP, x: Stream) -> Stream:
    return count(tally, mlp.fc2, count(tally, mlp.fc1, x))


@counts(LoRALinear)
def _lora_linear(tally: Tally, module: LoRALinear, x: Stream) -> Stream:
    return count(tally, module.base, x).after(low_rank(tally, module, x).grad)


@counts(PromptedBlock)
def _prompted_block(tally: Tally, module: PromptedBlock, x: Stream) -> Stream:
    tokens = _with_prompts(tally, module, x)
    return replace(count(tally, module.block, tokens), rows=x.rows)


@counts(ConnectedBlock)
def _connected_block(tally: Tally, module: ConnectedBlock, x: Stream) -> Stream:
    prompts = size(module.prompts, 0)
    plain = module.num_prefix + module.num_patches
    tokens = _with_prompts(tally, module, replace(x, rows=plain))
    if module.gate is not None:
        # Gates of the outputs at the prompts before, which scale those prompts.
        tokens = tokens.after(count(tally, module.gate, replace(x, rows=prompts)).grad)
    _salience(tally, module, tokens.rows)
    out = count(tally, module.block, tokens).after(tally.uses(module.gamma))
    read = tally.attention(
        size(module.prompts, 1),
        replace(out, rows=module.num_patches),
        *(Stream(prompts, tokens.grad),) * 2,
    )
    return replace(out.after(read.grad), rows=plain if module.is_last else plain + 2 * prompts)


def _with_prompts(tally: Tally, module: PromptedBlock, x: Stream) -> Stream:
    return Stream(x.rows + size(module.prompts, 0), x.grad | tally.uses(module.prompts))


def _salience(tally: Tally, module: ConnectedBlock, tokens: float) -> None:
    """Count which patches a block attends to: without gradients, queries averaged over readers."""
    attn = module.block.attn
    width = _width(attn)
    readers = 1 if module.has_cls else module.num_patches
    tally.product(readers, width, width, left=False, right=False)
    tally.product(tokens, width, width, left=False, right=False)
    tally.product(1, width, tokens, left=False, right=False)


@counts(QuestionAwareAttention)
def _question_aware(tally: Tally, attn: QuestionAwareAttention, x: Stream) -> Stream:
    text_tokens = min(tally.text_tokens, attn.max_text_tokens)
    text = count(tally, attn.text_proj, Stream(text_tokens, False))
    both = Stream(x.rows + text_tokens, x.grad or text.grad)
    query = count(tally, attn.q_proj, x)
    key, value = (count(tally, part, both) for part in (attn.k_proj, attn.v_proj))
    mixed = tally.attention(_width(attn), query, key, value)
    gated = count(tally, attn.gated_proj, mixed).after(tally.uses(attn.beta))
    return count(tally, attn.out_proj, mixed).after(gated.grad)


@counts(CoMoE)
def _comoe(tally: Tally, layer: CoMoE, x: Stream) -> Stream:
    gates, active = _gates(tally, layer, x)
    experts = layer.experts
    units = size(experts.up, 0) // experts.num_experts * active
    weights = (experts.up, experts.up_bias, experts.down, experts.down_bias)
    out = _gated_ffn(tally, x, units, *weights, gates=gates)
    bias = tally.uses(experts.down_bias)
    return out.after(
        tally.product(1, active, size(experts.down, 0), left=gates, right=bias) or gates
    )


def _gates(tally: Tally, layer: CoMoE, x: Stream) -> tuple[bool, int]:
    """Count CVE and router; return whether the gates need a gradient, and the active experts."""
    instead = layer.inference
    router = layer.router
    active = layer.experts.num_experts
    if router.sparse:
        assert isinstance(router, (Router, RandomRouter)) and router.top_k is not None
        active = router.top_k
    if instead is not None and instead.top_k is not None:
        active = min(active, instead.top_k)
    if instead is not None and instead.gates is not None:
        tally.uses(*layer.router.parameters(), *_parameters(layer.cve))
        return False, active
    vector = Stream(1, x.grad if layer.context in ("image-only", "concat") else False)
    if layer.cve is not None:
        vector = count(tally, layer.cve, x)
    if not isinstance(router, Router):
        return False, active
    if router.weight is None:
        return tally.uses(router.bias), active
    grad = tally.product(
        1,
        size(router.weight, 1),
        layer.experts.num_experts,
        left=vector.grad,
        right=tally.uses(router.weight),
    )
    return grad | tally.uses(router.bias), active


@counts(CVE)
def _cve(tally: Tally, cve: CVE, x: Stream) -> Stream:
    width, dim, heads = cve.width, size(cve.q_proj, 0), cve.num_heads
    image = count(tally, cve.image_resblock, x)
    text = count(tally, cve.text_resblock, Stream(1, False)).grad
    query = tally.product(1, dim, dim, left=text, right=tally.uses(cve.q_proj))
    query |= tally.uses(cve.q_bias)
    # The key projection is folded into the query, and values are projected after pooling.
    query = tally.product(1, dim, width, left=query, right=tally.uses(cve.k_proj))
    pooled = tally.attention(width, Stream(heads, query), image, image).grad
    value = tally.uses(cve.v_proj, cve.v_bias)
    out = tally.product(1, dim, width, left=pooled, right=value)
    out |= tally.product(1, dim, dim, left=text, right=value)
    return count(tally, cve.out_proj, Stream(1, out))


@counts(ResidualBlock)
def _residual_block(tally: Tally, block: ResidualBlock, x: Stream) -> Stream:
    up, down = block.fc1, block.fc2
    weights = (up.weight, up.bias, down.weight, down.bias)
    inner = _gated_ffn(tally, x, up.out_features, *weights, gates=False)
    return count(tally, block.ln, x.after(inner.grad))


def _gated_ffn(
    tally: Tally,
    x: Stream,
    units: int,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    *,
    gates: bool,
) -> Stream:
    """Count :func:`covft.vft.gated_ffn.gated_ffn` without its biases' product with the gates."""
    width = size(up, 1)
    grad = tally.product(x.rows, width, units, left=x.grad, right=tally.uses(up))
    # The gates' gradient is made of the hidden units' one.
    grad = grad | tally.uses(up_bias) | gates
    grad = tally.product(x.rows, units, width, left=grad, right=tally.uses(down))
    return Stream(x.rows, grad | tally.uses(down_bias))


@counts(QMoEConnector)
def _q_moe_connector(tally: Tally, connector: QMoEConnector, x: Stream) -> Stream:
    normed = count(tally, connector.norm, x)
    memory = count(tally, connector.feature_proj, normed)
    queries = Stream(size(connector.queries, 0), tally.uses(connector.queries))
    for layer in connector.layers:
        queries = _q_moe_layer(tally, layer, queries, memory)
    found = _query_attention(tally, connector.readout, normed, queries)
    return x.after(found.grad | tally.uses(connector.gamma))


def _q_moe_layer(tally: Tally, layer: Any, queries: Stream, memory: Stream) -> Stream:
    assert isinstance(layer, QMoELayer)
    normed = count(tally, layer.norm1, queries)
    queries = queries.after(_query_attention(tally, layer.self_attn, normed, normed).grad)
    normed = count(tally, layer.norm2, queries)
    queries = queries.after(_query_attention(tally, layer.cross_attn, normed, memory).grad)
    normed = count(tally, layer.norm3, queries)
    gates = count(tally, layer.router.proj, Stream(1, False))
    for expert in layer.experts:
        queries = queries.after(count(tally, expert, normed).grad or gates.grad)
    return queries


def _query_attention(tally: Tally, attn: QueryAttention, queries: Stream, memory: Stream) -> Stream:
    query = count(tally, attn.q_proj, queries)
    key, value = (count(tally, part, memory) for part in (attn.k_proj, attn.v_proj))
    return count(tally, attn.out_proj, tally.attention(_width(attn), query, key, value))


def _width(attn: Any) -> int:
    """Return the width of all of an attention's heads, by its projection of the values."""
    linear: Any = attn.v_proj
    while not hasattr(linear, "out_features"):
        linear = linear.base  # adapted
    return int(linear.out_features)


def _parameters(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())
