"""vLLM's build for CPUs, in bfloat16, with n-gram speculation if asked."""

from __future__ import annotations

import os

from bench.engines.driver import Generate, Job, run


def load(job: Job) -> Generate:
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{job.threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    speculative = None
    if job.speculation == "ngram":
        speculative = {"method": "ngram", "num_speculative_tokens": job.drafts, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
    model = LLM(
        job.model, dtype="bfloat16", max_model_len=1024, max_num_seqs=job.batch, speculative_config=speculative,
        enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


if __name__ == "__main__":
    run(load)
