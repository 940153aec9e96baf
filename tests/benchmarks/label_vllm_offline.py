"""A program for vLLM's environment: ``vllm.LLM`` on a folder of WAV files, for ``tests.benchmarks.label_vllm``.

    PYTHON label_vllm_offline.py MODEL CLIPS PROMPT_IDS MAX_TOKENS SLOTS ROUNDS OPTIONS ANSWER

Writes wall and processor seconds of each round, start-up and the first pass left out, as JSON to the file ANSWER.
"""

import json
import sys
import time
from pathlib import Path

import psutil
import soundfile
from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM starts processes that import this file again
    model, clips, prompt_ids, max_tokens, slots, rounds, options, answer = sys.argv[1:]
    end_id, *ids = json.loads(prompt_ids)
    llm = LLM(model=model, max_num_seqs=int(slots), **json.loads(options))
    sampling = SamplingParams(
        temperature=0,
        max_tokens=int(max_tokens),
        logprobs=0,
        ignore_eos=True,
        stop_token_ids=[end_id],
        detokenize=False,
    )
    requests = [
        {"prompt_token_ids": ids, "multi_modal_data": {"audio": [soundfile.read(path, dtype="float32")]}}
        for path in sorted(Path(clips).glob("*.wav"))
    ]
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]

    def processor_seconds() -> float:
        times = [process.cpu_times() for process in processes]
        return sum(one.user + one.system for one in times)

    spent = []
    for _ in range(int(rounds) + 1):
        begun, processor = time.perf_counter(), processor_seconds()
        llm.generate(requests, sampling, use_tqdm=False)
        spent.append((time.perf_counter() - begun, processor_seconds() - processor))
    Path(answer).write_text(json.dumps(spent[1:]))
