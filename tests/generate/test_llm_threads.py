"""Calls of `jaxmoe.LLM` at the same time, in threads and coroutines."""

import asyncio
import dataclasses
import threading
import time

from jaxmoe import LLM, Sampling
from jaxmoe.generation.turns import Turns

PROMPTS = ["the rain", [256, 104, 105], "in the plain"]
CHAT = [{"role": "user", "content": "Hi"}]
DRAWN = Sampling(temperature=1.0, top_p=1.0, seed=4)


def test_turns_come_in_the_order_in_which_they_are_asked_for():
    """Catches a thread that takes the lock again and again, and keeps others from it."""
    turns, order, threads = Turns(), [], []

    def take(name):
        with turns:
            order.append(name)

    with turns:
        for name in range(5):
            threads.append(threading.Thread(target=take, args=(name,)))
            threads[-1].start()
            while len(turns._waiting) < name + 2:
                time.sleep(0.001)
    with turns:
        assert order == list(range(5))


def test_threads_may_call_at_the_same_time(llm):
    expected = [llm.generate(PROMPTS[:i], DRAWN, max_new_tokens=12) for i in (1, 2, 3)]
    found = {}

    def call(i):
        found[i] = llm.generate(PROMPTS[:i], DRAWN, max_new_tokens=12)

    threads = [threading.Thread(target=call, args=(i,)) for i in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in (1, 2, 3)] == expected


def test_coroutines_may_call_at_the_same_time(llm):
    """And the event loop goes on meanwhile."""
    expected = llm.generate(PROMPTS, DRAWN, max_new_tokens=12)
    chat = llm.chat(CHAT, DRAWN, max_new_tokens=12)

    async def tick(beats):
        while True:
            beats.append(len(beats))
            await asyncio.sleep(0.001)

    async def stream():
        return [piece async for piece in llm.astream(PROMPTS, DRAWN, max_new_tokens=12)]

    async def all_of_them():
        beats = []
        ticking = asyncio.create_task(tick(beats))
        found = await asyncio.gather(
            llm.agenerate(PROMPTS, DRAWN, max_new_tokens=12),
            stream(),
            llm.achat(CHAT, DRAWN, max_new_tokens=12),
        )
        ticking.cancel()
        return found, len(beats)

    (results, pieces, chats), beats = asyncio.run(all_of_them())
    assert results == expected and chats == chat and beats > 3
    assert pieces == list(llm.stream(PROMPTS, DRAWN, max_new_tokens=12))


def test_a_stream_that_is_cancelled_stops_and_frees_its_turn(llm, monkeypatch):
    """Catches a run that goes on for a consumer that has left."""
    closed, original = [], LLM.stream

    def counted(self, *args, **options):
        count = 0
        try:
            for piece in original(self, *args, **options):
                count += 1
                yield piece
        finally:
            closed.append(count)

    monkeypatch.setattr(LLM, "stream", counted)

    async def cancelled():
        first = asyncio.create_task(consume())
        second = asyncio.create_task(llm.agenerate("never", DRAWN))
        await asyncio.sleep(0)
        while not seen:
            await asyncio.sleep(0.001)
        second.cancel()
        first.cancel()
        done = await asyncio.gather(first, second, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in done)
        return await llm.agenerate("the", DRAWN, max_new_tokens=2)

    seen = []

    async def consume():
        endless = dataclasses.replace(DRAWN, ignore_eos=True)
        async for piece in llm.astream("the rain", endless, max_new_tokens=170):
            seen.append(piece)

    (after,) = asyncio.run(cancelled())
    assert len(after.tokens) == 2
    assert len(closed) == 2, "the one that was cancelled while it waited never began"
    assert closed[0] < 170 and closed[1] == 2
