"""Builds blip2c._core from csrc/ and puts a private copy of OpenBLAS beside it.

Environment: BLIP2C_WERROR=1 makes warnings errors; BLIP2C_SANITIZE=address,undefined builds with sanitizers.
"""

import os
import platform
import sys
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
