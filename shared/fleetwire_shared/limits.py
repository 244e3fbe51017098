"""Numbers both sides of the wire rely on. Bytes, seconds and counts; each with the reason for its value."""

from typing import Final

MAX_CONTROL_FRAME_BYTES: Final = 1024 * 1024
"""A larger control frame is refused by its receiver: one peer cannot make the other allocate at will."""

CHUNK_BYTES: Final = 64 * 1024
"""Payload of one bulk frame and of one command output frame. 256 KiB frames measured slower."""

MAX_LINE_BYTES: Final = 64 * 1024
"""Longer log lines are cut to this, and the cut is said in the line."""

MAX_LINES_PER_FRAME: Final = 256
"""Log lines travel in batches; with `CHUNK_BYTES` this bounds what one frame holds."""

HEARTBEAT_SECONDS: Final = 20.0
SILENCE_SECONDS: Final = 60.0
"""A link on which nothing arrived for this long (three heartbeats) is dropped by either side."""

METRICS_SECONDS: Final = 5.0

RECONNECT_MIN_SECONDS: Final = 1.0
RECONNECT_MAX_SECONDS: Final = 60.0

COMMAND_TIMEOUT_MIN_SECONDS: Final = 1
COMMAND_TIMEOUT_MAX_SECONDS: Final = 86_400
COMMAND_TIMEOUT_DEFAULT_SECONDS: Final = 30
MAX_COMMAND_BYTES: Final = 128 * 1024
"""Linux refuses a single argument of 128 KiB or more (MAX_ARG_STRLEN), and `sh -c` takes the text as one."""

MAX_KILLED_LISTED: Final = 100
"""Processes a result names of those a stop ended; a fork bomb has thousands, of which the count tells."""

COMMAND_PREVIEW_CHARACTERS: Final = 200
"""Of a command's text in the hello: 256 of them must fit into one frame."""

OUTPUT_WINDOW_BYTES: Final = 1024 * 1024
"""Output of one command that the agent sends ahead of `output_stored`. What does not fit waits on the host's disk, as
all of it does while the server is away: bounds what a link and its peers hold of one command in memory."""

OUTPUT_KEEP_BYTES: Final = 16 * 1024 * 1024
"""Output the server keeps of one stream of one command: the first half of this and the last half."""

INSTALLATION_BYTES: Final = 12_000_000
"""Room on /opt for a version of the agent unpacked and compiled, twice over: the one before stays."""

MAX_PATH_BYTES: Final = 4096
MAX_COMMANDS_AT_ONCE: Final = 32

AGENT_KEY_PATTERN: Final = r"agt_[0-9a-z]{16}_[0-9A-Za-z_-]{43}"
"""`agt_<id>_<secret>`: the id of `agent_<id>`, then 256 random bits, URL-safe base64. ASCII only."""

AGENT_ID_PATTERN: Final = r"agent_[0-9a-z]{16}"
COMMAND_ID_PATTERN: Final = r"cmd_[0-9a-z]{20}"
CHANNEL_ID_PATTERN: Final = r"ch_[0-9a-z]{20}"
