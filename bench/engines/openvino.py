"""OpenVINO GenAI: its continuous batching on a CPU, with prompt lookup if asked."""

from __future__ import annotations

import openvino_genai as genai
from openvino import Tensor

from bench.engines.driver import Generate, Job, run


def load(job: Job) -> Generate:
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = job.batch
    scheduler.cache_size = 1  # GB
    scheduler.enable_prefix_caching = False
    options = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
    if job.speculation == "ngram":
        options["prompt_lookup"] = True
    pipeline = genai.ContinuousBatchingPipeline(job.model, scheduler, "CPU", options)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        config = genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        if job.speculation == "ngram":
            config.num_assistant_tokens, config.max_ngram_size = job.drafts, 3
        results = pipeline.generate([Tensor([prompt]) for prompt in prompts], [config] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in results]

    return generate


if __name__ == "__main__":
    run(load)
