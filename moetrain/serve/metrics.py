"""Prometheus metrics under vLLM's names, so that its dashboards work."""

from dataclasses import replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from moetrain.inference.protocol import Counts
from moetrain.serve.job import Job

_LATENCIES = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
_DURATIONS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)


class ServeMetrics:
    """The metrics of one server. The engine thread and the event loop may call its methods at the same time."""

    def __init__(self, *, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name}

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"vllm:{name}", text, ["model_name"], registry=self._registry).labels(**self._labels)

        def counter(name: str, text: str, *, owner: str = "vllm") -> Counter:
            return Counter(f"{owner}:{name}", text, ["model_name"], registry=self._registry).labels(**self._labels)

        def histogram(name: str, text: str, *, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"vllm:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
            return made.labels(**self._labels)

        self._running = gauge("num_requests_running", "Sequences that are decoded.")
        self._waiting = gauge("num_requests_waiting", "Sequences that wait for a slot.")
        self._pages = gauge("kv_cache_usage_perc", "Share of the pages of the cache that sequences use; 1 is all.")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._cached = counter("prompt_tokens_cached", "Tokens of prompts that were found in the cache.")
        self._queries = counter("prefix_cache_queries", "Tokens of prompts that were looked up in the cache.")
        self._hits = counter("prefix_cache_hits", "Tokens of prompts that were found in the cache.")
        self._preemptions = counter("num_preemptions", "Times that a sequence was preempted and recomputed.")
        self._drafts = counter("spec_decode_num_drafts", "Drafts.")
        self._drafted = counter("spec_decode_num_draft_tokens", "Tokens of drafts.")
        self._right = counter("spec_decode_num_accepted_tokens", "Tokens of drafts that were right.")
        self._generated = counter("generation_tokens", "Tokens that were generated.")
        self._ends = Counter(
            "vllm:request_success", "Finished sequences.", ["model_name", "finished_reason"], registry=self._registry
        )
        self._ttft = histogram("time_to_first_token_seconds", "Seconds to the first token.", buckets=_LATENCIES)
        self._between = histogram("inter_token_latency_seconds", "Seconds between tokens.", buckets=_LATENCIES)
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "Mean seconds per token after the first.", buckets=_LATENCIES
        )
        self._whole = histogram(
            "e2e_request_latency_seconds", "Seconds of a sequence, with its queue.", buckets=_DURATIONS
        )
        self._queued = histogram("request_queue_time_seconds", "Seconds in the queue.", buckets=_DURATIONS)
        self._prefill = histogram(
            "request_prefill_time_seconds", "Seconds from the queue to a token.", buckets=_DURATIONS
        )
        self._decode = histogram("request_decode_time_seconds", "Seconds from the first token on.", buckets=_DURATIONS)
        self._steps = histogram("iteration_tokens_total", "Tokens that were sampled per step.", buckets=_COUNTS)
        self._prompts = histogram("request_prompt_tokens", "Tokens of the prompt.", buckets=_COUNTS)
        self._answers = histogram(
            "request_generation_tokens", "Tokens that were generated per sequence.", buckets=_COUNTS
        )
        self._stray = counter("stray_markers", "Markers left out of answers.", owner="moetrain")
        self._forced = counter(
            "forced_tokens", "Tokens that a constraint forced and that were fed together.", owner="moetrain"
        )
        self._constraint = counter("constraint_seconds", "Seconds that constraints took.", owner="moetrain")
        self._counts = Counts()
        self._refused = Counter(
            "moetrain:refused_requests", "Requests refused.", ["model_name", "status"], registry=self._registry
        )

    def set_load(self, *, running: int, waiting: int) -> None:
        """Record how many sequences are decoded and how many wait."""
        self._running.set(running)
        self._waiting.set(waiting)

    def observe_engine(self, counts: Counts) -> None:
        """Record what the engine has done. The counts of a new engine, which begin at 0, are added to those before."""
        before, self._counts = self._counts, replace(counts)
        self._pages.set(counts.num_pages_used / max(counts.num_pages, 1))
        for counter, now, past in (
            (self._preemptions, counts.num_preemptions, before.num_preemptions),
            (self._drafts, counts.num_drafts, before.num_drafts),
            (self._drafted, counts.num_drafted, before.num_drafted),
            (self._right, counts.num_right, before.num_right),
            (self._forced, counts.num_forced, before.num_forced),
            (self._constraint, counts.constraint_s, before.constraint_s),
        ):
            counter.inc(now - past if now >= past else now)

    def observe_begin(self, job: Job, *, num_cached: int) -> None:
        """Record that a job has left the queue."""
        assert job.begun is not None
        self._queued.observe(job.begun - job.submitted)
        self._prompt.inc(job.num_prompt)
        self._prompts.observe(job.num_prompt)
        self._queries.inc(job.num_prompt)
        self._cached.inc(num_cached)
        self._hits.inc(num_cached)

    def observe_tokens(self, job: Job, *, number: int, now: float) -> None:
        """Record the new tokens of a job."""
        self._generated.inc(number)
        if job.first is None:
            job.first = now
            self._ttft.observe(now - job.submitted)
            self._prefill.observe(now - (job.begun or now))
        else:
            self._between.observe(now - job.last)
        job.last = now

    def observe_end(self, job: Job, *, now: float) -> None:
        """Record the times of a job whose turn has ended."""
        number = job.num_sent - job.num_prompt
        first = job.first or now
        self._answers.observe(number)
        self._whole.observe(now - job.submitted)
        self._decode.observe(now - first)
        if number > 1:
            self._per_token.observe((now - first) / (number - 1))

    def observe_step(self, num_tokens: int) -> None:
        """Record how many tokens a step sampled."""
        self._steps.observe(num_tokens)

    def count_end(self, reason: str) -> None:
        """Count a sequence by its finish reason; `abort` for one that was cancelled."""
        self._ends.labels(**self._labels, finished_reason=reason).inc()

    def count_stray(self, number: int) -> None:
        """Count markers that were left out of an answer."""
        self._stray.inc(number)

    def count_refusal(self, status: int) -> None:
        """Count a request that was refused."""
        self._refused.labels(**self._labels, status=str(status)).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
