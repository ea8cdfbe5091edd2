from __future__ import annotations

import pickle

import pytest

from mmixer_kernels.errors import DamagedFile, UserError, user_errors


def test_damaged_files_can_be_sent_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DamagedFile("clip.avi", "is broken")))
    assert type(error) is DamagedFile
    assert str(error) == "clip.avi: is broken"


def test_faults_of_the_user_become_user_errors_and_bugs_do_not() -> None:
    for error in (ValueError("x"), FileNotFoundError("x"), ImportError("x")):
        with pytest.raises(UserError, match="x"), user_errors():
            raise error
    with pytest.raises(RuntimeError), user_errors():
        raise RuntimeError
    with pytest.raises(UserError), user_errors(RuntimeError):
        raise RuntimeError
