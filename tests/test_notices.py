import logging

import pytest

from diffusers_dti.notices import notice_dropped


def test_drops_one_message_of_one_logger_within_the_block_only(caplog):
    named, other = logging.getLogger("library.module"), logging.getLogger("library.other")

    def speak():
        named.warning("No keys for %s", "this")
        named.warning("Something else: No keys for it")
        other.warning("No keys for that")

    with pytest.raises(KeyError), notice_dropped("library.module", "No keys for"):
        speak()
        raise KeyError
    assert caplog.messages == ["Something else: No keys for it", "No keys for that"]
    speak()
    assert len(caplog.messages) == 5
