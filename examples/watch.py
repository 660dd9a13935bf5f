#!/usr/bin/env python3
"""Print the events of all jobs as they happen: python3 examples/watch.py data/events.ipc"""
import json
import sys
import zmq

if len(sys.argv) != 2:
    sys.exit(__doc__)
socket = zmq.Context.instance().socket(zmq.SUB)
socket.setsockopt(zmq.SUBSCRIBE, b"JOB_EVENT")
socket.connect("ipc://" + sys.argv[1])
print("listening", flush=True)
while True:
    _, _, body = socket.recv_multipart()  # topic, header, body: docs/protocol.md, section 2
    body = json.loads(body)
    event = body["event"]
    figures = (f"{key} {event[key]}" for key in ("state", "step", "loss", "reason", "error") if key in event)
    print(event["job_id"], body["lora_id"], *figures, flush=True)
