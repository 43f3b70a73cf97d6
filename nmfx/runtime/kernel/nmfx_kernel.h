/* The sparse kernel as a C library: programs of N:M-sparse and dense operators, run over tensors in memory.
 *
 * Tensors come and go as DLPack's (https://dmlc.github.io/dlpack, version 0.x: DLTensor and DLManagedTensor), on the CPU, of at
 * most NMFX_DIMS dimensions, of float32, int16, int32, int64, uint8 or int8. What a DLTensor says of its memory is believed; all else, every
 * size, number, index and place, is checked before it is used.
 *
 * A program is a line of int64. LIST stands for a count and then as many numbers. Slots are numbered from 0: the inputs, then
 * one for the result of every step.
 *
 *   inputs, LIST of each one's sizes (-1: any; an empty list: all of them any),
 *   steps, and for each: 1 if its result leaves the program, else 0; the code of its operator (nmfx_operator_name); its
 *     arguments, as nmfx/runtime/operators.py has them in order; LIST of the slots that no later step reads,
 *   LIST of the slots that are the outputs.
 *
 * An argument is a number, a LIST, a double as the int64 of the same bits, or for a tensor its slot, -1 for none, or -2 - i for
 * constant i; a residual is followed by 1 if the output may be written over it, else 0. So {1, 3, -1, 3, 4, 1, 1, 5, 0, 1, 0,
 * 1, 1} takes one input (any, 3, 4), flattens it (code 5, argument slot 0) and frees slot 0; slot 1 is the output.
 *
 * No function throws or ends the process. Those that can fail return null or a status that is not NMFX_OK; nmfx_error says what
 * was expected. A program can be run by several threads at once.
 */
#ifndef NMFX_KERNEL_H
#define NMFX_KERNEL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define NMFX_API __declspec(dllexport)
#else
#define NMFX_API __attribute__((visibility("default")))
#endif

#define NMFX_VERSION 1 /* of this interface */
#define NMFX_DIMS 8

#ifndef DLPACK_VERSION /* DLPack's own header may come first */
typedef struct {
  int32_t device_type; /* 1: CPU */
  int32_t device_id;
} DLDevice;
typedef struct {
  uint8_t code; /* 0: signed integer, 1: unsigned, 2: floating point */
  uint8_t bits;
  uint16_t lanes; /* 1 */
} DLDataType;
typedef struct {
  void *data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape;
  int64_t *strides; /* in elements; null: in order, without gaps */
  uint64_t byte_offset;
} DLTensor;
typedef struct DLManagedTensor {
  DLTensor dl_tensor;
  void *manager_ctx;
  void (*deleter)(struct DLManagedTensor *self);
} DLManagedTensor;
#endif

typedef enum { NMFX_OK = 0, NMFX_REFUSED = 1, NMFX_NO_MEMORY = 2 } nmfx_status;
typedef struct nmfx_program nmfx_program;

/* NMFX_VERSION of the library. */
NMFX_API int32_t nmfx_version(void);
/* 1 if this processor has the instructions that the library was built for. Until it has said so, call nothing else. */
NMFX_API int32_t nmfx_supported(void);
/* What it was built for, as the end of its file's name says it: avx2, avx512_vnni, ...; empty if its build did not say. */
NMFX_API const char *nmfx_variant(void);
/* Floats of a vector: pictures as lanes have so many lanes. */
NMFX_API int64_t nmfx_vector_length(void);
/* The name of operator `code` of a program; null beyond the last. */
NMFX_API const char *nmfx_operator_name(int64_t code);
/* What the last call of this thread that failed has expected. */
NMFX_API const char *nmfx_error(void);

/* A program of `count` numbers and the tensors that it names, all of which are copied; null if they cannot be.
 * What they say is checked when it runs. */
NMFX_API nmfx_program *nmfx_program_new(const int64_t *numbers, int64_t count, const DLTensor *constants, int64_t constant_count);
NMFX_API void nmfx_program_free(nmfx_program *program);
/* Runs a program on `input_count` inputs that it only reads, with up to `threads` threads. With `images` above 0 the batch is cut
 * into passes of so many samples, each of which stays on one thread. The `output_count` outputs, as many as the program has, are
 * new tensors, which the caller gives back by their deleter; none are made if it fails. */
NMFX_API nmfx_status nmfx_program_run(nmfx_program *program, const DLTensor *inputs, int64_t input_count, int64_t images,
                                      int64_t threads, DLManagedTensor **outputs, int64_t output_count);

/* Work is shared by threads of the library's own, or by those of an OpenMP runtime of the process, so that two pools do not wait
 * for one another's cores: `parallel` is its GOMP_parallel, `number` and `team` are omp_get_thread_num and omp_get_num_threads.
 * Nulls go back to the library's own. Not while a program runs. */
NMFX_API void nmfx_use_openmp(void (*parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags),
                              int (*number)(void), int (*team)(void));

#ifdef __cplusplus
}
#endif
#endif
