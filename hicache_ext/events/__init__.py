"""KV events: what lies where, said in the messages that routers read already.

Belongs here: the messages (model), how they leave this process (publisher), how a stream is read (subscriber) and
checked (check). Does not belong here: where a page came from; nothing here knows an engine or a backend.
"""
