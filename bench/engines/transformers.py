"""transformers: eager generation in bfloat16, with prompt lookup or a draft model if asked."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.engines.driver import Generate, Job, run


def load(job: Job) -> Generate:
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    if job.speculation == "ngram":
        options["prompt_lookup_num_tokens"] = job.drafts
    elif job.speculation == "model":
        assert job.draft_model is not None
        assistant = AutoModelForCausalLM.from_pretrained(job.draft_model, dtype=torch.bfloat16)
        assistant.generation_config.num_assistant_tokens = job.drafts
        # The larger vocabulary is filled up with words that nobody writes.
        assistant.config.get_text_config().vocab_size = model.config.vocab_size
        options["assistant_model"] = assistant

    @torch.inference_mode()
    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[1] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **options)
        return [row[longest:].tolist() for row in out]

    return generate


if __name__ == "__main__":
    run(load)
