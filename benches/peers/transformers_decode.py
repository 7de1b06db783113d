#!/usr/bin/env python3
"""Times decode steps of Hugging Face transformers on the shapes that `spinkv bench decode --random-weights` measures.

A model of the first --layers layers of Qwen3-14B's shape with random bf16 weights and a KV cache in HBM that is full to --context, dense
attention as the library chooses it (sdpa). Of each batch two rows: `eager`, as `model(...)` is called, and `graph`, the same forward pass captured into a
CUDA graph, without Python's part. The cache is the library's StaticCache; its DynamicCache copies all KV in every step. Times are medians of --steps steps,
by CUDA events; a step's tokens are real (the greedy ones of the step before).

    python3 benches/peers/transformers_decode.py --layers 8 --batches 1,8,16 --contexts 32768 --json hf.json
"""

import argparse
import gc
import json
import statistics

LAYERS = 40


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser.add_argument("--layers", type=int, default=8, help="of 40")
    parser.add_argument("--batches", type=numbers, default=[1, 8, 16])
    parser.add_argument("--contexts", type=numbers, default=[32768])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--json", help="also write the rows to this file")
    return parser.parse_args()


def model_of(torch, transformers, layers):
    config = transformers.Qwen3Config(
        vocab_size=151936, hidden_size=5120, intermediate_size=17408, num_hidden_layers=layers,
        num_attention_heads=40, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        rms_norm_eps=1e-6, tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def filled_cache(torch, transformers, model, batch, context, room):
    cache = transformers.StaticCache(config=model.config, max_cache_len=context + room)
    keys = torch.randn(batch, 8, context, 128, device="cuda", dtype=torch.bfloat16)
    for layer in range(model.config.num_hidden_layers):
        cache.update(keys, keys, layer, {"cache_position": torch.arange(context, device="cuda")})
    return cache


def timed(torch, step, warm_up, steps):
    for _ in range(warm_up):
        step()
    times = []
    for _ in range(steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def measure(torch, transformers, model, batch, context, args):
    room = 4 * (args.warm_up + args.steps) + 16
    cache = filled_cache(torch, transformers, model, batch, context, room)
    ids = torch.randint(0, 151936, (batch, 1), device="cuda")
    position = torch.full((1,), context, device="cuda")

    def step():
        with torch.no_grad():
            logits = model(input_ids=ids, past_key_values=cache, cache_position=position, position_ids=position[None],
                           use_cache=True).logits
            ids.copy_(logits[:, -1].argmax(-1, keepdim=True))
            position.add_(1)

    rows = [("eager", timed(torch, step, args.warm_up, args.steps))]
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        rows.append(("graph", timed(torch, graph.replay, args.warm_up, args.steps)))
    except Exception as error:
        print(f"  graph, batch {batch}, {context} tokens: {type(error).__name__}: {error}", flush=True)
    del cache
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def main():
    args = arguments()
    import torch
    import transformers

    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}")
    model = model_of(torch, transformers, args.layers)
    found = []
    for context in args.contexts:
        for batch in args.batches:
            try:
                rows = measure(torch, transformers, model, batch, context, args)
            except torch.cuda.OutOfMemoryError:
                print(f"  batch {batch}, {context} tokens: out of GPU memory", flush=True)
                torch.cuda.empty_cache()
                continue
            for how, ms in rows:
                print(f"  {args.layers} layers, batch {batch:3}, {context} tokens, {how}: {ms:.3f} ms, {batch / ms * 1e3:.0f} tokens/s", flush=True)
                found.append({"layers": args.layers, "batch": batch, "context": context, "how": how, "step_ms": ms})
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
