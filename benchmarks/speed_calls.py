"""What benchmarks.speed times: layers, heads, updates, whole steps and generation, as calls."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import Rival, rival_model
from parallel.config import ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WHOLE_LAYERS = 8
GENERATED = 16  # tokens a call


@dataclass(frozen=True)
class Problem:
    """A dtype, a length of sequences, a width of the feed-forward, and how many sequences."""

    dtype: str
    length: int
    intermediate: int
    sequences: int = 1

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length

    @property
    def key(self) -> str:
        """Of what is remembered."""
        return f"{self.dtype} {self.sequences} x {self.length} {self.intermediate}"

    def model(self, layers: int) -> ModelConfig:
        """The published default: hidden 1024, 8 heads of 128, no groups shared."""
        return ModelConfig(
            vocab_size=1024 * layers,
            hidden_size=1024,
            intermediate_size=self.intermediate,
            num_layers=layers,
            num_heads=8,
            num_kv_heads=8,
            head_dim=128,
            state_dim=128,
            ssd_groups=8,
            max_position_embeddings=max(self.length, 4096),
        )


def device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def join() -> None:
    """A job of this process alone."""
    from parallel.compat import prepare_host
    from parallel.config import ParallelConfig
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import Launch

    init_distributed(Launch(0, 1, 0), prepare_host())
    init_groups(ParallelConfig())


def stage(model: ModelConfig, problem: Problem) -> Any:
    """The model as training has it."""
    from parallel.build import build_stage
    from parallel.config import ParallelConfig

    built = build_stage(
        model,
        ParallelConfig(),
        seq_len=problem.length,
        dtype=DTYPES[problem.dtype],
        seed=0,
        deterministic=False,
        device=device(),
    )
    return built.chunks[0]


def places(problem: Problem) -> tuple[Tensor, Tensor]:
    """position_ids and cu_seqlens of whole sequences."""
    borders = torch.arange(problem.sequences + 1, dtype=torch.int32, device=device())
    position_ids = torch.arange(problem.length, dtype=torch.int32, device=device())
    return position_ids.repeat(problem.sequences, 1), borders * problem.length


def layer_call(model: ModelConfig, layer: int, problem: Problem) -> Callable[[], object]:
    """Forward and backward of a decoder layer by itself."""
    attends = model.is_attention(layer)
    alone = model.model_dump() | {
        "num_layers": 1,
        "attn_layer_period": 1,
        "attn_layer_offset": 0 if attends else 1,
        "vocab_size": 128,
    }
    module = stage(ModelConfig.model_validate(alone), problem)
    positions = module.positions(*places(problem), None)
    h = torch.randn(problem.tokens, 1, model.hidden_size, device=device())
    h = h.to(DTYPES[problem.dtype])
    h.requires_grad_()
    grad = torch.randn_like(h)
    weights = [p for p in module.model.layers.parameters() if p.requires_grad]
    run = module.model.layers["0"]
    return lambda: torch.autograd.grad(run(h, None, positions, None)[0], [h, *weights], grad)


def products_call(problem: Problem, *, attention: bool) -> Callable[[], object]:
    """The matrix products of a layer's projections, forward and backward, and of its scan or causal
    attention as full products would have them."""
    model, where, dtype = problem.model(8), device(), DTYPES[problem.dtype]
    hidden, width = model.hidden_size, model.num_heads * model.head_dim
    shapes = [(hidden, width)] * 3 + [(width, hidden)]  # q k v o, or x b c out
    shapes += [(hidden, model.intermediate_size)] * 2 + [(model.intermediate_size, hidden)]
    pairs = []
    for inputs, outputs in shapes:
        x = torch.randn(problem.tokens, inputs, device=where).to(dtype)
        w = torch.randn(outputs, inputs, device=where).to(dtype)
        y = torch.randn(problem.tokens, outputs, device=where).to(dtype)
        pairs.append((x, w, y))
    heads = (model.num_heads * problem.sequences, problem.length, model.head_dim)
    q, k = (torch.randn(heads, device=where).to(dtype) for _ in range(2))
    chunk = 64

    def mixer() -> None:
        if attention:  # causal: half of each of 2 products forward and 4 backward
            blocks = 512
            for at in range(0, problem.length, blocks):
                rows = q[:, at : at + blocks]
                for _ in range(3):
                    (rows @ k[:, : at + blocks].mT) @ k[:, : at + blocks]
        else:  # within chunks 2 products forward and 4 backward; states as many of P × N
            a = q.reshape(-1, chunk, model.head_dim)
            b = k.reshape(-1, chunk, model.head_dim)
            for _ in range(3):
                (a @ b.mT) @ b
                a @ (a.mT @ b)

    def call() -> None:
        for x, w, y in pairs:
            x @ w.T, y @ w, y.T @ x
        mixer()

    return call


def head_call(problem: Problem, layers: int) -> tuple[Callable[[], object], int]:
    """Forward and backward of the output head and its loss, and over how many tokens."""
    from parallel.loss import head_loss

    model, where = problem.model(layers), device()
    tokens = min(problem.tokens, 16384 if where.type == "cuda" else 1024)
    h = torch.randn(tokens, model.hidden_size, device=where).to(DTYPES[problem.dtype])
    weight = 0.02 * torch.randn(model.vocab_size, model.hidden_size, device=where)
    weight = weight.to(DTYPES[problem.dtype])
    labels = torch.randint(model.vocab_size, (tokens,), device=where)
    mask = torch.ones(tokens, device=where)

    def call() -> None:
        a, b = h.detach().requires_grad_(), weight.detach().requires_grad_()
        head_loss(a, b, labels, mask, model.vocab_size)[0].backward()

    return call, tokens


def update_call(problem: Problem) -> tuple[Callable[[], object], int]:
    """AdamW on float32 weights, and how many they are."""
    weight = torch.nn.Parameter(torch.zeros(1 << 24, device=device()))
    weight.grad = torch.ones_like(weight)
    adam = torch.optim.AdamW([weight], fused=True)
    return adam.step, weight.numel()


def step_call(model: ModelConfig, problem: Problem) -> Callable[[], object]:
    """Forward, backward and update."""
    module = stage(model, problem)
    adam = torch.optim.AdamW(module.parameters(), fused=True)
    shape = (problem.sequences, problem.length)
    tokens, labels = torch.randint(model.vocab_size, (2, *shape), device=device())
    position_ids, borders = places(problem)
    mask = torch.full(shape, 1 / problem.tokens, device=device())

    def call() -> None:
        loss, _ = module(tokens, labels, mask, position_ids, borders)
        loss.backward()
        adam.step()
        adam.zero_grad()

    return call


def hugging_face_call(model: Any, problem: Problem) -> Callable[[], object]:
    """The same step."""
    model = model.to(device(), DTYPES[problem.dtype])
    adam = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(
        model.config.vocab_size, (problem.sequences, problem.length), device=device()
    )

    def call() -> None:
        model(tokens, labels=tokens).loss.backward()
        adam.step()
        adam.zero_grad()

    return call


def generation_call(rival: Rival, problem: Problem) -> Callable[[], object]:
    """GENERATED tokens, greedily; the context is what it was, as far as time goes."""
    from checkpoints_tools.single_gpu import Cache, TransXSSM
    from checkpoints_tools.source import single_gpu_config

    model = rival_model(rival, problem.model(WHOLE_LAYERS))
    state = {"config": {"model": model.model_dump()}, "eod_id": 0, "pad_id": 0}
    single = TransXSSM(single_gpu_config(state, problem.dtype))
    single = single.to(device(), DTYPES[problem.dtype]).eval()
    cache = Cache(single.config)
    with torch.no_grad():
        context = torch.randint(model.vocab_size, (1, problem.length), device=device())
        single.hidden(context, cache)

    @torch.no_grad()
    def call() -> None:
        token = context[:, -1:]
        for _ in range(GENERATED):
            logits: Tensor = single.logits(single.hidden(token, cache)[:, -1])
            token = logits.argmax(-1, keepdim=True)

    return call
