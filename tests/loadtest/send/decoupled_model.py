"""The `model.py` of a decoupled model in a real server: it answers `count` times, with 0, 1, 2 and so on."""

import threading
import time

import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.answer, args=(request,)).start()

    def answer(self, request):
        sender = request.get_response_sender()
        for number in range(int(pb.get_input_tensor_by_name(request, "count").as_numpy()[0])):
            time.sleep(0.01)
            sender.send(pb.InferenceResponse([pb.Tensor("y", np.array([number], np.int32))]))
        sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
