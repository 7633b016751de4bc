"""The Triton kernels: what they do, in Triton's interpreter, and that they compile for a device that is not here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with PyTorch where that is built for CUDA")

INTERPRETED = Path(__file__).with_name("triton_interpreted.py")


def test_the_promise_in_the_interpreter():
    """In a process of its own: Triton looks at the variable when the kernels are defined."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    result = subprocess.run(
        [*command, str(INTERPRETED)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert re.search(r"\b3\d passed", result.stdout)


POINTERS = {"jobs": "*i64", "blocks": "*i64", "broken": "*i64", "squares": "*fp64", "totals": "*fp64"}
TOOLS = ("ptxas", "ptxas-blackwell", "cuobjdump")


@pytest.fixture
def compile_for_device(tmp_path, monkeypatch):
    """Compiles a kernel as for an H100; gives its PTX, its registers a thread and its stack in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    missing = [tool for tool in TOOLS if not (tools / tool).exists()]
    if missing:
        pytest.skip(f"this Triton brings no {' or '.join(missing)} to compile with")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile_one(kernel, weight, centre, compute_capability=90):
        names = kernel.arg_names
        kinds = {name: POINTERS.get(name, "constexpr" if name.isupper() else "i32") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in POINTERS}
        source = triton.compiler.ASTSource(kernel, kinds, {"WEIGHT": weight, "CENTRE": centre}, aligned)
        target = GPUTarget("cuda", compute_capability, 32)
        compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True})
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", binary], capture_output=True, text=True, check=True
        )
        registers, stack = (int(re.search(rf"{what}:(\d+)", usage.stdout)[1]) for what in ("REG", "STACK"))
        return compiled.asm["ptx"], registers, stack

    return compile_one


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16")], ids="-".join)
@pytest.mark.parametrize("name", ["_mars", "_measure", "_scale"])
def test_it_compiles_for_a_device_with_wide_loads_and_few_registers(compile_for_device, name, dtypes):
    from triton import language as tl

    from tethertune.kernels import triton as kernels

    weight, centre = (getattr(tl, dtype) for dtype in dtypes)
    ptx, registers, stack = compile_for_device(getattr(kernels, name), weight, centre)
    print(f"{name}, {weight} around {centre}: {registers} registers, {stack} bytes of stack")  # noqa: T201
    assert registers <= 96  # five programs of 128 threads on a processor at once
    assert stack <= 64
    wide = re.findall(r"ld\.global\S*\.v[24]\S*", ptx)
    assert len(wide) >= 2  # of the weights and of the centre: 16 bytes a thread, where 16-bit weights are settled 8
    assert name == "_scale" or sum("v4" in load for load in wide) >= 2
    assert "call.uni" not in re.sub(r"__assertfail|vprintf", "", ptx)  # all in one function
