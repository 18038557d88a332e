"""The command line: everything a user can get wrong, and what is written to disk."""

import pytest

import generate as module


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", "a", "--tempo", "3"], "--tempo"),
    (["--prompt", "a", "--temperature", "warm"], "--temperature"),
    (["--prompt", "a", "--dtype", "int3"], "--dtype"),
])
def test_wrong_options_are_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("prompts, count, expected", [
    (["a"], 0, ["a"]),
    (["a"], 2, ["<image><image>a"]),
    (["a", "b"], 2, ["<image>a", "<image>b"]),
    (["a<image>", "b"], 1, ["a<image>", "b"]),
])
def test_pictures_without_a_place_go_in_front(prompts, count, expected):
    assert module.place_images(prompts, count) == expected


def test_pictures_that_could_go_anywhere_are_refused():
    with pytest.raises(ValueError, match="3 pictures for 2 prompts"):
        module.place_images(["a", "b"], 3)


def test_a_device_that_is_not_there_is_one_clear_line():
    with pytest.raises(ValueError, match="--device quantum cannot be used"):
        module.pick_device("quantum")
