import json

import numpy as np
import tritonclient.grpc as grpc_library
import tritonclient.http as http_library
from tritonclient.grpc import service_pb2

from loadtest.record.results import Script, Turn
from loadtest.send import wire

INPUTS = {
    "x": np.arange(6, dtype=np.float32).reshape(2, 3),
    "flag": np.array([[True], [False]]),
    "text": np.array([["a"], ["zwölf"]]).astype(object),
}


def test_http_body_is_what_the_reference_client_sends() -> None:
    inputs = []
    for name, datatype in (("x", "FP32"), ("flag", "BOOL"), ("text", "BYTES")):
        tensor = http_library.InferInput(name, list(INPUTS[name].shape), datatype)
        inputs.append(tensor.set_data_from_numpy(INPUTS[name]))
    body, length = http_library.InferenceServerClient.generate_request_body(inputs)
    head, _, sent = wire.HttpRequests("h:1").request("m", INPUTS, "2").partition(b"\r\n\r\n")
    assert sent == body
    assert head.startswith(b"POST /v2/models/m/versions/2/infer HTTP/1.1\r\nHost: h:1\r\n")
    assert f"Inference-Header-Content-Length: {length}".encode() in head
    assert f"\r\nContent-Length: {len(body)}".encode() in head


def test_grpc_message_is_what_the_reference_client_sends() -> None:
    message = service_pb2.ModelInferRequest.FromString(wire.grpc_request("m", INPUTS, "2"))
    assert (message.model_name, message.model_version) == ("m", "2")
    for place, (name, datatype) in enumerate((("x", "FP32"), ("flag", "BOOL"), ("text", "BYTES"))):
        tensor = grpc_library.InferInput(name, list(INPUTS[name].shape), datatype)
        tensor.set_data_from_numpy(INPUTS[name])
        assert message.inputs[place] == tensor._get_tensor()
        assert message.raw_input_contents[place] == tensor._get_content()


def test_outputs_come_back_as_they_were() -> None:
    head = (
        b'{"outputs":[{"name":"x","datatype":"FP32","shape":[2,3],"parameters":{"binary_data_size":24}},'
        b'{"name":"text","datatype":"BYTES","shape":[2,1],"parameters":{"binary_data_size":15}}]}'
    )
    text = b"\x01\x00\x00\x00a\x06\x00\x00\x00zw\xc3\xb6lf"
    outputs = wire.http_outputs(head, INPUTS["x"].tobytes() + text)
    np.testing.assert_array_equal(outputs["x"], INPUTS["x"])
    assert outputs["text"].tolist() == [[b"a"], ["zwölf".encode()]]


def test_a_turn_of_a_sequence_travels_with_its_request() -> None:
    turns = [Turn(10**12, Script(0, 3, 2)), Turn(10**12, Script(0, 3, 2), 2), Turn(7, Script(0, 1, 1))]
    for turn, start, end in zip(turns, (True, False, True), (False, True, True), strict=True):
        wanted = {"sequence_id": turn.id, "sequence_start": start, "sequence_end": end}
        _, _, body = wire.HttpRequests("h:1").request("m", INPUTS, turn=turn).partition(b"\r\n\r\n")
        told, _ = json.JSONDecoder().raw_decode(body.decode("latin-1"))
        assert wanted.items() <= told["parameters"].items()
        message = service_pb2.ModelInferRequest.FromString(wire.grpc_request("m", INPUTS, turn=turn))
        sent = message.parameters.items()
        assert {key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in sent} == wanted
