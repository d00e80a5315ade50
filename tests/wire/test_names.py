import os

from tesseract_async.wire import names


def test_names_are_all_different() -> None:
    drawn = [names.new_name() for _ in range(1000)]
    assert len(set(drawn)) == 1000
    assert {len(name) for name in drawn} == {16}


def test_a_forked_process_draws_others() -> None:
    names.new_name()  # some are in store now
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"".join(names.new_name() for _ in range(3)))
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(read, 1000)
    os.close(read)
    os.close(write)
    assert len(theirs) == 48
    assert not {names.new_name() for _ in range(300)} & {theirs[:16], theirs[16:32], theirs[32:]}
