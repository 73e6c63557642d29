"""`moetrain bench drafts`."""

from moetrain.cli.bench import run_bench
from moetrain.commands.bench_generation import BenchDraftsRun
from moetrain.commands.stage import check_length


def main(run: BenchDraftsRun) -> int:
    """Measure each kind of draft in turn, print the table and write bench.json; return 0.

    Raises `BoundError` if a draft changes a token.
    """
    weights = run.require_weights()
    # These imports load torch, so they wait until the input has been checked.
    from moetrain.bench.drafts import Contestant, bench_drafts, render
    from moetrain.inference.speculation import Speculation
    from moetrain.kernels.choice import find_for_generation
    from moetrain.run.trained_context import check_context
    from moetrain.run.weights import generation_model, read_weights, tokenizer_of
    from moetrain.tasks import registry

    origin = read_weights(weights)
    tokenizer = tokenizer_of(origin)
    tokenizer.check_chat()
    check_context(run.task.context, origin, otherwise="")
    check_length(origin.model, name="rollout.max_tokens", length=run.rollout.max_tokens)
    library = find_for_generation(run.rollout.kernels)
    plain = generation_model(origin, library=library)
    contestants = [
        Contestant(name="none", model=plain, speculation=Speculation.off),
        Contestant(name="repeated tokens", model=plain, speculation=Speculation.auto),
    ]
    if origin.model.num_mtp_layers:
        with_module = generation_model(origin, library=library, speculation=Speculation.auto)
        contestants.append(Contestant(name="and the MTP module", model=with_module, speculation=Speculation.auto))
    return run_bench(
        run,
        lambda folder: bench_drafts(
            run, contestants=contestants, family=registry.build(run.task, run.run.seed), tokenizer=tokenizer
        ),
        render=render,
    )
