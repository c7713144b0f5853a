"""Builds blip2c._core from csrc/ and puts a private copy of OpenBLAS beside it; with nvcc the CUDA backend, _cuda.so.

Environment: BLIP2C_WERROR=1 makes warnings errors; BLIP2C_SANITIZE=address,undefined builds with sanitizers.
BLIP2C_CUDA=1 insists on the CUDA backend, 0 leaves it out; not set, it is built where there is nvcc (in CUDACXX,
CUDA_HOME, PATH, /usr/local/cuda), but not by `build_ext --inplace`. BLIP2C_CUDA_ARCH="80 90" names the architectures,
in place of all that are known here and to nvcc.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import scipy_openblas32
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86_64 = platform.machine().lower() in ("x86_64", "amd64")

# One source per kernel; these files include it once for each instruction set.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISA_FLAGS = {
    "csrc/ops/cpu/kernels_avx2.c": AVX2,
    "csrc/ops/cpu/kernels_avx512.c": AVX512,
    "csrc/ops/cpu/quads_avx2.c": AVX2,
    "csrc/ops/cpu/quad_tiles_avx2.c": AVX2,
    "csrc/ops/cpu/quad_tiles_avx512.c": AVX512,
    "csrc/ops/cpu/quad_tiles_vnni.c": [*AVX512, "-mavx512vnni"],
    "csrc/ops/cpu/quads_vnni.c": [*AVX512, "-mavx512vnni"],
    "csrc/ops/cpu/pairs_bf16.c": AVX512,
}
# A public SONAME would be shared with whatever else in the process uses OpenBLAS. The new name is as long as the old
# one, so that it can be written over it.
OPENBLAS_OLD = b"libscipy_openblas.so\0"
OPENBLAS_NEW = b"libblip2_openblas.so\0"


# Whose binaries are built, as far as nvcc knows them, and of the last one PTX: cards to come compile that.
CUDA_ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]
CUDA_CORE = ["core/arena.c", "core/cancel.c", "core/error.c", "core/memory.c", "ops/finite.c"]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in named if name and (found := shutil.which(name))), None)


def cuda_sources() -> list[Path]:
    return [*sorted((ROOT / "csrc" / "ops" / "cuda").glob("*.cu")), *(ROOT / "csrc" / name for name in CUDA_CORE)]


def cuda_architectures(nvcc: str) -> list[str]:
    """Of this nvcc's, those that are asked for."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    asked = os.environ.get("BLIP2C_CUDA_ARCH", "").replace(";", " ").replace(",", " ").split()
    if missing := [a for a in asked if a not in known]:
        raise RuntimeError(f"BLIP2C_CUDA_ARCH: {nvcc} has {' '.join(sorted(known, key=int))}, not {' '.join(missing)}")
    chosen = asked or [a for a in CUDA_ARCHITECTURES if a in known]
    if not chosen:
        raise RuntimeError(f"{nvcc} knows none of the architectures {' '.join(CUDA_ARCHITECTURES)}")
    return chosen


def gencode(architectures: list[str]) -> list[str]:
    last = architectures[-1]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    return [*codes, f"-gencode=arch=compute_{last},code=compute_{last}"]


def nvcc_command(nvcc: str, targets: list[str]) -> list[str]:
    host = "-fPIC,-fvisibility=hidden,-Wall,-Wextra"
    command = [nvcc, "-std=c++17", "-O3", *targets, f"-I{ROOT / 'csrc'}", "--threads=1"]
    if os.environ.get("BLIP2C_WERROR") == "1":
        command += ["-Werror=all-warnings"]
        host += ",-Werror"
    return [*command, f"-Xcompiler={host}"]


def build_cuda(library: Path, objects: Path) -> str:
    """Builds `library`, anew only what is older than a source or header; returns what it was built for."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("no nvcc (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)")
    architectures = cuda_architectures(nvcc)
    targets = gencode(architectures)
    objects = objects / "-".join(architectures)
    objects.mkdir(parents=True, exist_ok=True)
    newest = max(header.stat().st_mtime for header in (ROOT / "csrc").rglob("*.h"))
    c_compiler = os.environ.get("CC") or "cc"

    def compile_one(source: Path) -> Path:
        out = objects / f"{source.name}.o"
        if out.exists() and out.stat().st_mtime > max(newest, source.stat().st_mtime):
            return out
        c_command = [*c_compiler.split(), *c_flags(), "-fPIC", f"-I{ROOT / 'csrc'}"]
        command = nvcc_command(nvcc, targets) if source.suffix == ".cu" else c_command
        done = subprocess.run([*command, "-c", source, "-o", out], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.relative_to(ROOT)}: {done.stdout}{done.stderr}")
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = list(pool.map(compile_one, cuda_sources()))
    library.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [nvcc, "-shared", "-cudart=static", *targets, *built, "-o", library, "-ldl", "-lpthread"], check=True
    )
    return f"{nvcc}, sm_{' sm_'.join(architectures)} and PTX"


def c_sources() -> list[str]:
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.c"))
    return [s for s in sources if X86_64 or s not in ISA_FLAGS]


def c_flags() -> list[str]:
    # No contraction by the compiler: fused multiply-adds are written where they are meant, so all kernels round alike.
    flags = ["-std=c11", "-O3", "-Wall", "-Wextra", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]
    if os.environ.get("BLIP2C_WERROR") == "1":
        flags.append("-Werror")
    if sanitize := os.environ.get("BLIP2C_SANITIZE"):
        flags += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g"]
    return flags


def link_flags() -> list[str]:
    flags = ["-pthread"]
    flags.append("-Wl,-rpath,@loader_path/.libs" if sys.platform == "darwin" else "-Wl,-rpath,$ORIGIN/.libs")
    if sanitize := os.environ.get("BLIP2C_SANITIZE"):
        flags.append(f"-fsanitize={sanitize}")
    return flags


class BuildWithPrivateOpenBLAS(build_ext):
    """Compiles each instruction set with its own flags; vendors OpenBLAS into blip2c/.libs."""

    def run(self) -> None:
        super().run()
        self.build_backend()

    def build_backend(self) -> None:
        """Says in one line what became of CUDA."""
        wanted = os.environ.get("BLIP2C_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise RuntimeError(f"BLIP2C_CUDA: expected 0 or 1, found {wanted!r}")
        if wanted == "0" or (wanted == "" and (self.inplace or os.environ.get("BLIP2C_SANITIZE"))):
            print("blip2c: without CUDA, as asked" if wanted else "blip2c: without CUDA (BLIP2C_CUDA=1 builds it)")
            return
        library = (ROOT if self.inplace else Path(self.build_lib)) / "blip2c" / "_cuda.so"
        try:
            how = build_cuda(library, Path(self.build_temp) / "cuda")
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise
            print(f"blip2c: without CUDA: {error}")
        else:
            print(f"blip2c: with CUDA: {how}")

    def build_extension(self, ext: Extension) -> None:
        libs = Path(self.get_ext_fullpath(ext.name)).parent / ".libs"
        library = self.vendor_openblas(libs)
        ext.extra_objects = [str(library)]
        compile_one = self.compiler._compile

        def compile_with_isa(obj, src, file_ext, cc_args, extra_postargs, pp_opts):
            extra = ISA_FLAGS.get(Path(src).as_posix(), []) if X86_64 else []
            compile_one(obj, src, file_ext, cc_args, extra_postargs + extra, pp_opts)

        self.compiler._compile = compile_with_isa
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self.vendor_openblas(ROOT / "blip2c" / ".libs")

    def vendor_openblas(self, libs: Path) -> Path:
        libs.mkdir(parents=True, exist_ok=True)
        source = Path(scipy_openblas32.get_lib_dir())
        if sys.platform == "darwin":
            library = libs / "libblip2_openblas.dylib"
            library.write_bytes((source / "libscipy_openblas.dylib").read_bytes())
            self.spawn(["install_name_tool", "-id", f"@rpath/{library.name}", str(library)])
            return library
        library = libs / OPENBLAS_NEW[:-1].decode()
        data = (source / OPENBLAS_OLD[:-1].decode()).read_bytes()
        if data.count(OPENBLAS_OLD) != 1:
            raise RuntimeError(f"{source}: expected the SONAME {OPENBLAS_OLD[:-1].decode()} once")
        library.write_bytes(data.replace(OPENBLAS_OLD, OPENBLAS_NEW))
        library.chmod(0o755)
        return library


setup(
    ext_modules=[
        Extension(
            "blip2c._core",
            sources=c_sources(),
            depends=[str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.[hc]")],
            include_dirs=["csrc", numpy.get_include(), scipy_openblas32.get_include_dir()],
            extra_compile_args=c_flags(),
            extra_link_args=link_flags(),
        )
    ],
    cmdclass={"build_ext": BuildWithPrivateOpenBLAS},
)
