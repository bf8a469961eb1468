/* What vm-backend-libkrun uses of libkrun 1.19, in C: for machines on which the library was built from its crate, which
 * brings no header. An installed libkrun has its own.
 *
 * Results below zero are the negatives of error numbers. Types are plain ones, so that nothing has to be included.
 */
#ifndef LIBKRUN_H
#define LIBKRUN_H

int krun_init_log(int target_fd, unsigned int level, unsigned int style, unsigned int options);
int krun_create_ctx(void);
int krun_free_ctx(unsigned int ctx_id);
int krun_disable_implicit_console(unsigned int ctx_id);
int krun_disable_implicit_vsock(unsigned int ctx_id);
int krun_set_env(unsigned int ctx_id, const char *const envp[]);
int krun_set_vm_config(unsigned int ctx_id, unsigned char num_vcpus, unsigned int ram_mib);
int krun_set_kernel(unsigned int ctx_id, const char *kernel_path, unsigned int kernel_format, const char *initramfs,
                    const char *cmdline);
int krun_add_serial_console_default(unsigned int ctx_id, int input_fd, int output_fd);
int krun_add_virtio_console_multiport(unsigned int ctx_id);
int krun_add_console_port_tty(unsigned int ctx_id, unsigned int console_id, const char *name, int tty_fd);
int krun_add_disk2(unsigned int ctx_id, const char *block_id, const char *disk_path, unsigned int disk_format,
                   _Bool read_only);
int krun_add_virtiofs3(unsigned int ctx_id, const char *tag, const char *path, unsigned long shm_size, _Bool read_only);
int krun_add_net_unixstream(unsigned int ctx_id, const char *path, int fd, unsigned char *mac, unsigned int features,
                            unsigned int flags);
int krun_add_vsock(unsigned int ctx_id, unsigned int tsi_features);
int krun_add_vsock_port2(unsigned int ctx_id, unsigned int port, const char *file_path, _Bool listen);
int krun_start_enter(unsigned int ctx_id);

#endif
