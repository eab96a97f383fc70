# The instruction sets that CPU kernels are compiled for, each in a namespace of its own, and how.
set(FASTKD_ISAS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  list(APPEND FASTKD_ISAS avx2 avx512)
  set(FASTKD_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(FASTKD_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c
                          -mprefer-vector-width=512)
endif()

# fastkd_add_kernels(target isa source...): an object library for one instruction set.
# -Wno-psabi: vectors never cross the boundary of an instruction set's object files.
# -Wno-maybe-uninitialized: gcc's own intrinsics start from undefined registers.
# -fno-math-errno and -fno-trapping-math change no value; NaN and infinity keep their meaning.
function(fastkd_add_kernels target isa)
  add_library(${target} OBJECT ${ARGN})
  target_compile_options(${target} PRIVATE -O3 -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized
                                           -fno-math-errno -fno-trapping-math
                                           ${FASTKD_FLAGS_${isa}})
  target_compile_definitions(${target} PRIVATE FASTKD_ISA=${isa})
endfunction()
