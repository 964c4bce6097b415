"""Trees of messages (OpenAssistant): whole in one record, or a row for each message, linked by their ids. No files."""

from collections.abc import Iterable

from stagekit.dialogues import ROLES, is_missing, is_number
from stagekit.records import Message, Repairs, RowError, Tree, Unused, shown

MAX_DEPTH = 200  # OpenAssistant's deepest has a few dozen; what walks a tree is recursive


def is_tree(record: dict) -> bool:
    """Whether a record is a tree, with or without its wrapper, or a message with its id."""
    if "role" in record and "text" in record:
        return "message_id" in record or isinstance(record.get("replies"), list)
    asked = record.get("prompt")
    return isinstance(asked, dict) and "role" in asked and "text" in asked


def read_tree(record: dict, repairs: Repairs) -> Tree | Message:
    """Read a tree, or one message where a file has a row for each; the language is kept, and none is left out for it.

    Messages that were deleted, rejected in review or are empty are left out, and with them all that replies to them.

    Raises:
        Unused: the first message itself is left out.
        RowError: a message without role or text, or roles that do not alternate.
    """
    first = record.get("prompt") if isinstance(record.get("prompt"), dict) else record
    node = _read_node(first, None, repairs, 0)
    if first is not record or isinstance(record.get("replies"), list):
        if node.role != "user":
            raise RowError("a tree must begin with a message of the prompter")
        return node
    name, parent = record.get("message_id"), record.get("parent_id")
    if not isinstance(name, str) or not (isinstance(parent, str) or is_missing(parent)):
        raise RowError("fields 'message_id' and 'parent_id' must be strings, parent_id null for the first message")
    parent = parent if isinstance(parent, str) and parent else None
    return Message(name, parent, node.role, node.content, node.rank, node.lang)


def _read_node(record, parent_role, repairs, depth):
    """A Tree from a message with its replies; raises Unused where the message itself is left out."""
    if depth > MAX_DEPTH:
        raise RowError(f"its replies are nested more than {MAX_DEPTH} deep")
    role = ROLES.get(record["role"].lower()) if isinstance(record.get("role"), str) else None
    if role not in ("user", "assistant") or role == parent_role:
        after = f" in reply to {parent_role}" if parent_role else ""
        raise RowError(f"a message of a tree has the role {shown(record.get('role'))}{after}; expected them in turns")
    if record.get("deleted") is True:
        raise Unused("deleted", "the message was deleted")
    if record.get("review_result") is False:
        raise Unused("rejected in review", "the message was rejected in review")
    text, rank, lang = (record.get(key) for key in ("text", "rank", "lang"))
    if is_missing(text) or (isinstance(text, str) and not text.strip()):
        raise Unused("empty text", "the message is empty")
    if not isinstance(text, str):
        raise RowError(f"field 'text' of a message must be a string, got {type(text).__name__}")
    if not is_missing(rank) and not is_number(rank):
        raise RowError(f"field 'rank' must be a number or null, got {shown(rank)}")
    replies = []
    for reply in record["replies"] if isinstance(record.get("replies"), list) else []:
        if not isinstance(reply, dict):
            raise RowError("field 'replies' must be a list of messages")
        try:
            replies.append(_read_node(reply, role, repairs, depth + 1))
        except Unused:
            repairs.note("message of a tree left out with its replies")
    rank = None if is_missing(rank) else rank
    return Tree(role, text, rank, lang if isinstance(lang, str) else "", _best_first(replies))


def _best_first(replies):
    return sorted(replies, key=lambda reply: (reply.rank is None, reply.rank or 0))


def grow_trees(messages: Iterable[Message]) -> tuple[list[tuple[Tree, list[Message]]], list[Message]]:
    """Link the rows of a file that has one for each message.

    Args:
        messages: in any order.

    Returns:
        (trees, left over): trees in the order of their first messages, each with the messages it was made of; messages
        that belong to none, because their parent is not there (it was deleted, say), the roles do not alternate, or
        they are deeper than MAX_DEPTH.
    """
    messages = list(messages)
    replies: dict[str, list[Message]] = {}
    for message in messages:
        if message.parent is not None:
            replies.setdefault(message.parent, []).append(message)
    linked = set()

    def grow(message, depth, members):
        linked.add(id(message))
        members.append(message)
        grown = [
            grow(reply, depth + 1, members)
            for reply in replies.get(message.id, ())
            if reply.role != message.role and depth < MAX_DEPTH and id(reply) not in linked
        ]
        return Tree(message.role, message.content, message.rank, message.lang, _best_first(grown))

    trees = []
    for message in messages:
        if message.parent is None and message.role == "user":
            members: list[Message] = []
            trees.append((grow(message, 0, members), members))
    return trees, [message for message in messages if id(message) not in linked]
