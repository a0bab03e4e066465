"""True conversions written down tensor by tensor: fused, stacked, interleaved and transposed weights.

Language models, experts and vocoders, as transformers, vLLM, Megatron, torchtune and original repositories name them.

Every shape is small and every number distinct enough that a wrong pair is seen; names are those of the code bases.
"""

from __future__ import annotations

from collections.abc import Sequence

from suggest_families import Conversion, Entry, Shape

HIDDEN, HEADS, KV, HEAD, FFN, VOCABULARY, LAYERS = 48, 6, 2, 8, 80, 112, 3
Rows = Sequence[tuple[str, int]]


class Written:
    """A conversion in the making: each method adds one target (or several) and what it is made of."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.source: dict[str, Shape] = {}
        self.target: dict[str, Shape] = {}
        self.map: dict[str, Entry] = {}
        self.dropped: list[str] = []

    def _add(self, target: str, shape: Shape, sources: list[str], op: str, **detail: object) -> None:
        self.target[target] = shape
        self.map[target] = {"from": sources, "op": op, "detail": detail}

    def copy(self, source: str, target: str, *shape: int) -> None:
        self.source[source] = shape
        self._add(target, shape, [source], "copy")

    def reshape(self, source: str, target: str, given: Shape, shape: Shape) -> None:
        self.source[source] = given
        self._add(target, shape, [source], "reshape", shape=list(shape))

    def transpose(self, source: str, target: str, rows: int, columns: int) -> None:
        """``rows`` and ``columns`` of the target."""
        self.source[source] = (columns, rows)
        self._add(target, (rows, columns), [source], "transpose", perm=[1, 0])

    def reorder(self, source: str, target: str, runs: Sequence[tuple[int, int]], *shape: int) -> None:
        self.source[source] = shape
        self._add(target, shape, [source], "reorder", dim=0, runs=[list(run) for run in runs])

    def split(self, source: str, targets: Rows, *rest: int, dim: int = 0) -> None:
        """Parts of one source along ``dim``; ``rest`` are the other extents."""
        total, start = sum(size for _, size in targets), 0
        self.source[source] = (*rest[:dim], total, *rest[dim:])
        for target, size in targets:
            shape = (*rest[:dim], size, *rest[dim:])
            self._add(target, shape, [source], "split", dim=dim, start=start, stop=start + size)
            start += size

    def concat(self, sources: Rows, target: str, *rest: int, dim: int = 0) -> None:
        for source, size in sources:
            self.source[source] = (*rest[:dim], size, *rest[dim:])
        parts = [{"source": source, "start": None, "stop": None} for source, _ in sources]
        shape = (*rest[:dim], sum(size for _, size in sources), *rest[dim:])
        self._add(target, shape, [source for source, _ in sources], "concat", dim=dim, parts=parts)

    def stack(self, items: Sequence[Rows], target: str, *rest: int) -> None:
        """Each item is one source, or the rows of several."""
        parts: list[Entry] = []
        for item in items:
            for source, size in item:
                self.source[source] = (size, *rest)
            names = [source for source, _ in item]
            cuts = [{"source": source, "start": None, "stop": None} for source in names]
            single = len(item) == 1
            detail = {} if single else {"dim": 0, "parts": cuts}
            parts.append({"from": names, "op": "copy" if single else "concat", "detail": detail})
        names = [name for part in parts for name in part["from"]]
        shape = (len(items), sum(size for _, size in items[0]), *rest)
        self._add(target, shape, names, "stack", dim=0, parts=parts)

    def unstack(self, source: str, targets: Sequence[str], *shape: int) -> None:
        self.source[source] = (len(targets), *shape)
        for at, target in enumerate(targets):
            detail = {"dim": 0, "start": at, "stop": at + 1, "reshape": list(shape)}
            self._add(target, shape, [source], "split", **detail)

    def drop(self, source: str, *shape: int) -> None:
        self.source[source] = shape
        self.dropped.append(source)

    def done(self, *, developed_on: bool = True) -> Conversion:
        return Conversion(self.name, self.source, self.target, self.map, developed_on, tuple(self.dropped))


def rotary(heads: int, *, to_halves: bool) -> list[tuple[int, int]]:
    """Rows of every head from pairs to halves (or back): what another rotary convention asks for."""
    half = HEAD // 2
    pairs = [2 * at + part for part in range(2) for at in range(half)]
    order = pairs if to_halves else sorted(range(HEAD), key=pairs.__getitem__)
    return [(head * HEAD + row, head * HEAD + row + 1) for head in range(heads) for row in order]


def grouped_rows() -> list[list[tuple[int, int]]]:
    """Rows of q, k and v in a projection that holds for each key head its queries, its key and its value."""
    per, group = HEADS // KV, (HEADS // KV + 2) * HEAD
    starts = [group * at for at in range(KV)]
    return [
        [(start, start + per * HEAD) for start in starts],
        [(start + per * HEAD, start + (per + 1) * HEAD) for start in starts],
        [(start + (per + 1) * HEAD, start + group) for start in starts],
    ]


def torchtune_llama() -> Conversion:
    """transformers to torchtune: names alike, rows of q and k in another rotary order."""
    one = Written("torchtune_llama")
    one.copy("model.embed_tokens.weight", "tok_embeddings.weight", VOCABULARY, HIDDEN)
    for n in range(LAYERS):
        a, b = f"model.layers.{n}", f"layers.{n}"
        one.reorder(f"{a}.self_attn.q_proj.weight", f"{b}.attn.q_proj.weight", rotary(HEADS, to_halves=False), 48, 48)
        one.reorder(f"{a}.self_attn.k_proj.weight", f"{b}.attn.k_proj.weight", rotary(KV, to_halves=False), 16, 48)
        one.copy(f"{a}.self_attn.v_proj.weight", f"{b}.attn.v_proj.weight", 16, 48)
        one.copy(f"{a}.self_attn.o_proj.weight", f"{b}.attn.output_proj.weight", 48, 48)
        for old, new in (("gate", "w1"), ("up", "w3")):
            one.copy(f"{a}.mlp.{old}_proj.weight", f"{b}.mlp.{new}.weight", FFN, HIDDEN)
        one.copy(f"{a}.mlp.down_proj.weight", f"{b}.mlp.w2.weight", HIDDEN, FFN)
        one.copy(f"{a}.input_layernorm.weight", f"{b}.sa_norm.scale", HIDDEN)
        one.copy(f"{a}.post_attention_layernorm.weight", f"{b}.mlp_norm.scale", HIDDEN)
    one.copy("model.norm.weight", "norm.scale", HIDDEN)
    one.copy("lm_head.weight", "output.weight", VOCABULARY, HIDDEN)
    return one.done()


def hunyuan_image3() -> Conversion:
    """The language core into vLLM's modules: equal names, but grouped rows and swapped halves; experts stacked."""
    one = Written("hunyuan_image3_vllm")
    experts, width = 4, 24
    one.copy("model.wte.weight", "model.embed_tokens.weight", VOCABULARY, HIDDEN)
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        qkv = [run for runs in grouped_rows() for run in runs]
        one.reorder(*(f"{layer}.self_attn.qkv_proj.weight",) * 2, qkv, 80, HIDDEN)
        for leaf, shape in (
            ("self_attn.o_proj", (48, 48)),
            ("self_attn.query_layernorm", (HEAD,)),
            ("self_attn.key_layernorm", (HEAD,)),
            ("input_layernorm", (48,)),
            ("post_attention_layernorm", (48,)),
            ("mlp.shared_mlp.down_proj", (48, FFN)),
        ):
            one.copy(*(f"{layer}.{leaf}.weight",) * 2, *shape)
        one.copy(f"{layer}.mlp.gate.wg.weight", f"{layer}.mlp.gate.weight", experts, HIDDEN)
        halves = [(FFN, 2 * FFN), (0, FFN)]
        shared = f"{layer}.mlp.shared_mlp"
        one.reorder(f"{shared}.gate_and_up_proj.weight", f"{shared}.gate_up_proj.weight", halves, 2 * FFN, HIDDEN)
        names = [[(f"{layer}.mlp.experts.{e}.down_proj.weight", HIDDEN)] for e in range(experts)]
        one.stack(names, f"{layer}.mlp.experts.w2_weight", width)
    one.copy("model.ln_f.weight", "model.norm.weight", HIDDEN)
    return one.done()


def qwen3_moe(*, to_vllm: bool) -> Conversion:
    """Experts one by one into stacks: transformers' own or vLLM's, the latter with q, k and v fused."""
    one = Written("qwen3_moe_vllm" if to_vllm else "qwen3_moe_stacked")
    experts, width = 8, 24
    one.copy("model.embed_tokens.weight", "model.embed_tokens.weight", VOCABULARY, HIDDEN)
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        attn = f"{layer}.self_attn"
        rows = [(f"{attn}.{p}_proj.weight", 48 if p == "q" else 16) for p in "qkv"]
        if to_vllm:
            one.concat(rows, f"{attn}.qkv_proj.weight", HIDDEN)
        else:
            for name, size in rows:
                one.copy(name, name, size, HIDDEN)
        one.copy(*(f"{attn}.o_proj.weight",) * 2, HIDDEN, 48)
        for norm in ("q_norm", "k_norm"):
            one.copy(*(f"{attn}.{norm}.weight",) * 2, HEAD)
        one.copy(*(f"{layer}.mlp.gate.weight",) * 2, experts, HIDDEN)
        base = f"{layer}.mlp.experts"
        pairs = [[(f"{base}.{e}.{p}_proj.weight", width) for p in ("gate", "up")] for e in range(experts)]
        one.stack(pairs, f"{base}.{'w13_weight' if to_vllm else 'gate_up_proj'}", HIDDEN)
        down = [[(f"{base}.{e}.down_proj.weight", HIDDEN)] for e in range(experts)]
        one.stack(down, f"{base}.{'w2_weight' if to_vllm else 'down_proj'}", width)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            one.copy(*(f"{layer}.{norm}.weight",) * 2, HIDDEN)
    one.copy("model.norm.weight", "model.norm.weight", HIDDEN)
    one.copy("lm_head.weight", "lm_head.weight", VOCABULARY, HIDDEN)
    return one.done()


def vllm_gemma() -> Conversion:
    """Gemma 2 into vLLM: four norms a layer, gate and up fused, no head of its own."""
    one = Written("vllm_gemma2")
    one.copy("model.embed_tokens.weight", "model.embed_tokens.weight", VOCABULARY, HIDDEN)
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        rows = [(f"{layer}.self_attn.{p}_proj.weight", 48 if p == "q" else 16) for p in "qkv"]
        one.concat(rows, f"{layer}.self_attn.qkv_proj.weight", HIDDEN)
        one.copy(*(f"{layer}.self_attn.o_proj.weight",) * 2, HIDDEN, 48)
        halves = [(f"{layer}.mlp.{p}_proj.weight", FFN) for p in ("gate", "up")]
        one.concat(halves, f"{layer}.mlp.gate_up_proj.weight", HIDDEN)
        one.copy(*(f"{layer}.mlp.down_proj.weight",) * 2, HIDDEN, FFN)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            one.copy(*(f"{layer}.{norm}_layernorm.weight",) * 2, HIDDEN)
    one.copy("model.norm.weight", "model.norm.weight", HIDDEN)
    return one.done()


def megatron_llama() -> Conversion:
    """Megatron-core to transformers: grouped q/k/v rows, gate and up in one projection, norms inside the linears."""
    one = Written("megatron_llama")
    one.copy("embedding.word_embeddings.weight", "model.embed_tokens.weight", VOCABULARY, HIDDEN)
    for n in range(LAYERS):
        a, b = f"decoder.layers.{n}", f"model.layers.{n}"
        one.copy(f"{a}.self_attention.linear_proj.weight", f"{b}.self_attn.o_proj.weight", HIDDEN, 48)
        qkv = f"{a}.self_attention.linear_qkv"
        one.source[f"{qkv}.weight"] = (80, HIDDEN)
        for part, runs in zip("qkv", grouped_rows(), strict=True):
            rows = sum(stop - start for start, stop in runs)
            detail = {"dim": 0, "runs": [list(run) for run in runs]}
            one._add(f"{b}.self_attn.{part}_proj.weight", (rows, HIDDEN), [f"{qkv}.weight"], "reorder", **detail)
        one.copy(f"{qkv}.layer_norm_weight", f"{b}.input_layernorm.weight", HIDDEN)
        halves = [(f"{b}.mlp.{part}_proj.weight", FFN) for part in ("gate", "up")]
        one.split(f"{a}.mlp.linear_fc1.weight", halves, HIDDEN)
        one.copy(f"{a}.mlp.linear_fc1.layer_norm_weight", f"{b}.post_attention_layernorm.weight", HIDDEN)
        one.copy(f"{a}.mlp.linear_fc2.weight", f"{b}.mlp.down_proj.weight", HIDDEN, FFN)
    one.copy("decoder.final_layernorm.weight", "model.norm.weight", HIDDEN)
    one.copy("output_layer.weight", "lm_head.weight", VOCABULARY, HIDDEN)
    return one.done()


def t5x() -> Conversion:
    """T5 in flax to transformers: every kernel transposed, square ones too, no bias anywhere."""
    one = Written("t5_flax")
    one.copy("shared.embedding", "shared.weight", VOCABULARY, HIDDEN)
    for side in ("encoder", "decoder"):
        for n in range(LAYERS):
            layer = f"{side}.block.{n}.layer"
            attentions = [("SelfAttention", 0)] + ([("EncDecAttention", 1)] if side == "decoder" else [])
            for attention, at in attentions:
                for part in "qkvo":
                    name = f"{layer}.{at}.{attention}.{part}"
                    one.transpose(f"{name}.kernel", f"{name}.weight", HIDDEN, HIDDEN)
                one.copy(*(f"{layer}.{at}.layer_norm.weight",) * 2, HIDDEN)
            last = len(attentions)
            for part in ("wi_0", "wi_1"):
                name = f"{layer}.{last}.DenseReluDense.{part}"
                one.transpose(f"{name}.kernel", f"{name}.weight", FFN, HIDDEN)
            name = f"{layer}.{last}.DenseReluDense.wo"
            one.transpose(f"{name}.kernel", f"{name}.weight", HIDDEN, FFN)
            one.copy(*(f"{layer}.{last}.layer_norm.weight",) * 2, HIDDEN)
        one.copy(*(f"{side}.final_layer_norm.weight",) * 2, HIDDEN)
    return one.done()


def columns() -> Conversion:
    """Projections stored input first on both sides: fused ones are cut along their second axis."""
    one = Written("columns_fused")
    for n in range(LAYERS):
        layer = f"h.{n}"
        one.split(f"{layer}.attn.qkv.w", [(f"{layer}.attn.{part}.w", 48) for part in "qkv"], HIDDEN, dim=1)
        one.copy(*(f"{layer}.attn.o.w",) * 2, 48, HIDDEN)
        one.concat([(f"{layer}.ff.{part}.w", FFN) for part in ("gate", "up")], f"{layer}.ff.gate_up.w", HIDDEN, dim=1)
        one.copy(*(f"{layer}.ff.down.w",) * 2, FFN, HIDDEN)
        one.copy(f"{layer}.ln1.g", f"{layer}.norm1.g", HIDDEN)
    return one.done()


def deepseek() -> Conversion:
    """Latent attention and shared experts into vLLM: the down projections of queries and of keys and values fused."""
    one = Written("deepseek_vllm")
    latent, experts, width = 20, 4, 24
    one.copy(*("model.embed_tokens.weight",) * 2, VOCABULARY, HIDDEN)
    for n in range(LAYERS):
        attn, mlp = f"model.layers.{n}.self_attn", f"model.layers.{n}.mlp"
        rows = [(f"{attn}.q_a_proj.weight", 28), (f"{attn}.kv_a_proj_with_mqa.weight", latent + HEAD)]
        one.concat(rows, f"{attn}.fused_qkv_a_proj.weight", HIDDEN)
        one.copy(*(f"{attn}.q_a_layernorm.weight",) * 2, 28)
        one.copy(*(f"{attn}.kv_a_layernorm.weight",) * 2, latent)
        one.copy(*(f"{attn}.q_b_proj.weight",) * 2, HEADS * 2 * HEAD, 28)
        one.copy(*(f"{attn}.kv_b_proj.weight",) * 2, HEADS * 3 * HEAD, latent)
        one.copy(*(f"{attn}.o_proj.weight",) * 2, HIDDEN, HEADS * HEAD)
        one.copy(*(f"{mlp}.gate.weight",) * 2, experts, HIDDEN)
        halves = [(f"{mlp}.shared_experts.{part}_proj.weight", FFN) for part in ("gate", "up")]
        one.concat(halves, f"{mlp}.shared_experts.gate_up_proj.weight", HIDDEN)
        one.copy(*(f"{mlp}.shared_experts.down_proj.weight",) * 2, HIDDEN, FFN)
        pairs = [[(f"{mlp}.experts.{e}.{p}_proj.weight", width) for p in ("gate", "up")] for e in range(experts)]
        one.stack(pairs, f"{mlp}.experts.w13_weight", HIDDEN)
        down = [[(f"{mlp}.experts.{e}.down_proj.weight", HIDDEN)] for e in range(experts)]
        one.stack(down, f"{mlp}.experts.w2_weight", width)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            one.copy(*(f"model.layers.{n}.{norm}.weight",) * 2, HIDDEN)
    one.copy(*("model.norm.weight",) * 2, HIDDEN)
    one.copy(*("lm_head.weight",) * 2, VOCABULARY, HIDDEN)
    return one.done()


def qwen1() -> Conversion:
    """The first Qwen to llama's names: its w1 is the up projection, its w2 the gate."""
    one = Written("qwen1_llama")
    one.copy("transformer.wte.weight", "model.embed_tokens.weight", VOCABULARY, HIDDEN)
    for n in range(LAYERS):
        a, b = f"transformer.h.{n}", f"model.layers.{n}"
        one.split(f"{a}.attn.c_attn.weight", [(f"{b}.self_attn.{p}_proj.weight", 48) for p in "qkv"], HIDDEN)
        one.split(f"{a}.attn.c_attn.bias", [(f"{b}.self_attn.{p}_proj.bias", 48) for p in "qkv"])
        one.copy(f"{a}.attn.c_proj.weight", f"{b}.self_attn.o_proj.weight", HIDDEN, 48)
        one.copy(f"{a}.mlp.w1.weight", f"{b}.mlp.up_proj.weight", FFN, HIDDEN)
        one.copy(f"{a}.mlp.w2.weight", f"{b}.mlp.gate_proj.weight", FFN, HIDDEN)
        one.copy(f"{a}.mlp.c_proj.weight", f"{b}.mlp.down_proj.weight", HIDDEN, FFN)
        one.copy(f"{a}.ln_1.weight", f"{b}.input_layernorm.weight", HIDDEN)
        one.copy(f"{a}.ln_2.weight", f"{b}.post_attention_layernorm.weight", HIDDEN)
    one.copy("transformer.ln_f.weight", "model.norm.weight", HIDDEN)
    one.copy("lm_head.weight", "lm_head.weight", VOCABULARY, HIDDEN)
    return one.done()


def hifigan(*, parametrized: bool) -> Conversion:
    """A vocoder with weight norm, folded into plain convolutions; upsamplers are transposed convolutions."""
    one = Written("hifigan_parametrized" if parametrized else "hifigan_folded")
    leaves = ("parametrizations.weight.original0", "parametrizations.weight.original1")
    magnitude, direction = leaves if parametrized else ("weight_g", "weight_v")

    def fold(source: str, target: str, *shape: int) -> None:
        names = [f"{source}.{magnitude}", f"{source}.{direction}"]
        one.source |= {names[0]: (shape[0], 1, 1), names[1]: shape}
        one._add(f"{target}.weight", shape, names, "computed", ops=["weight_norm"])

    fold("generator.conv_pre", "vocoder.conv_pre", 32, 10, 7)
    one.copy("generator.conv_pre.bias", "vocoder.conv_pre.bias", 32)
    for n, width in enumerate((16, 8)):
        fold(f"generator.ups.{n}", f"vocoder.upsampler.{n}", 2 * width, width, 4)
        one.copy(f"generator.ups.{n}.bias", f"vocoder.upsampler.{n}.bias", width)
        for k, kernel in enumerate((3, 7, 11)):
            block = 3 * n + k
            for convs in ("convs1", "convs2"):
                for at in range(3):
                    name = f"resblocks.{block}.{convs}.{at}"
                    fold(f"generator.{name}", f"vocoder.{name}", width, width, kernel)
                    one.copy(f"generator.{name}.bias", f"vocoder.{name}.bias", width)
    fold("generator.conv_post", "vocoder.conv_post", 1, 8, 7)
    one.copy("generator.conv_post.bias", "vocoder.conv_post.bias", 1)
    return one.done()


def written_families() -> list[Conversion]:
    """All of them."""
    return [
        torchtune_llama(),
        hunyuan_image3(),
        qwen3_moe(to_vllm=True),
        qwen3_moe(to_vllm=False),
        vllm_gemma(),
        megatron_llama(),
        t5x(),
        columns(),
        deepseek(),
        qwen1(),
        hifigan(parametrized=False),
        hifigan(parametrized=True),
    ]
