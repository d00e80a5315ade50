"""Memory keeps its byte budget and forgets the oldest first."""

from __future__ import annotations

from tesseract_async.server.memory import Memory


def test_the_oldest_are_forgotten_beyond_the_budget() -> None:
    memory: Memory[int, str] = Memory(10, len)
    for key in range(5):
        assert memory.put(key, "xxxx")
    assert [memory.get(key) for key in range(5)] == [None, None, None, "xxxx", "xxxx"]
    assert memory.num_bytes == 8 and len(memory) == 2


def test_what_is_too_large_alone_is_not_kept() -> None:
    memory: Memory[int, str] = Memory(3, len)
    assert memory.put(1, "ab") and not memory.put(2, "abcd")
    assert memory.get(1) == "ab" and memory.get(2) is None


def test_replacing_and_popping_keep_the_count() -> None:
    memory: Memory[int, str] = Memory(10, len)
    memory.put(1, "abc")
    memory.put(1, "abcdef")
    assert memory.num_bytes == 6
    assert memory.pop(1) == "abcdef" and memory.pop(1) is None and memory.num_bytes == 0


def test_who_holds_most_loses_its_oldest() -> None:
    memory: Memory[int, str] = Memory(20, len)
    memory.put(100, "xxxx", owner="honest")
    for key in range(50):
        assert memory.put(key, "xxxx", owner="greedy")
    assert memory.get(100) == "xxxx" and memory.num_bytes == 20
    assert [key for key in range(50) if memory.get(key)] == [46, 47, 48, 49]
    for key in range(100, 104):
        memory.put(key, "xxxx", owner="honest")
    assert len(memory) == 5 and memory.num_bytes == 20


def test_what_is_old_is_forgotten() -> None:
    memory: Memory[int, str] = Memory(100, len, max_age=10.0)
    memory.put(1, "a", now=0.0)
    memory.put(2, "b", now=5.0)
    memory.put(1, "c", now=7.0)
    memory.expire(14.0)
    assert memory.get(1) == "c" and memory.get(2) == "b"
    memory.expire(15.0)
    assert memory.get(1) == "c" and memory.get(2) is None and memory.num_bytes == 1
    memory.expire(100.0)
    assert not len(memory) and memory.num_bytes == 0
