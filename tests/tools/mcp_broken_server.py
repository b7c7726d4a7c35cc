"""A server over stdio, written by hand, whose answers to calls are not what the protocol demands.

Its tool `say` writes `before`, and then an answer in the form `kind`.
"""

import json
import sys

SCHEMA = {"type": "object", "properties": {"before": {"type": "string"}}}


def result_of(request):
    match request["method"]:
        case "initialize":
            info = {"name": "broken", "version": "1"}
            version = request["params"]["protocolVersion"]
            return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
        case "tools/list":
            return {"tools": [{"name": "say", "description": "", "inputSchema": SCHEMA}]}
        case "tools/call":
            return {"content": [{"type": "text", "text": "one\n<half>"}]}
    return None


def in_form(message, kind):
    text = json.dumps(message, indent={"lines": 2, "one per line": 0}.get(kind))
    match kind:
        case "half":
            return text.replace("<half>", "\\ud800")
        case "raw line ends":
            return text.replace("\\n", "\n")
        case "garbage":
            return text.replace('"text"', "text")
    return text


for line in sys.stdin:
    request = json.loads(line)
    if "id" not in request:
        continue
    answer = {"jsonrpc": "2.0", "id": request["id"]}
    if (result := result_of(request)) is None:
        answer["error"] = {"code": -32601, "message": "Method not found"}
    else:
        answer["result"] = result
    how = request.get("params", {}).get("arguments", {})
    print(how.get("before", "") + in_form(answer, how.get("kind", "")), flush=True)
