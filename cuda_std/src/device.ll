; The support IR of cuda_std, linked into every kernel module by cuda_builder. It closes two holes of rustc's NVPTX target:
;
; - shared memory has no Rust spelling: @cuda_std_dynamic_shared is the launch's dynamic block, and its address is cast where LLVM can see
;   the cast, so accesses become ld.shared and st.shared;
; - asm! is not convergent: LLVM may sink or duplicate it across branches, which breaks a collective. Here each collective is a call
;   marked convergent.

target datalayout = "e-p6:32:32-i64:64-i128:128-i256:256-v16:16-v32:32-n16:32:64"
target triple = "nvptx64-nvidia-cuda"

@cuda_std_dynamic_shared = external addrspace(3) global [0 x i8], align 128

define linkonce_odr ptr @__cuda_std_dynamic_shared() #1 {
  ret ptr addrspacecast (ptr addrspace(3) @cuda_std_dynamic_shared to ptr)
}

define linkonce_odr i64 @__cuda_std_global_address(ptr %pointer) #1 {
  %global = addrspacecast ptr %pointer to ptr addrspace(1)
  %address = ptrtoint ptr addrspace(1) %global to i64
  ret i64 %address
}

define linkonce_odr i32 @__cuda_std_shared_address(ptr %pointer) #1 {
  %shared = addrspacecast ptr %pointer to ptr addrspace(3)
  %address = ptrtoint ptr addrspace(3) %shared to i32
  ret i32 %address
}

; Barriers of the block. The clobber keeps memory accesses on their side.

define linkonce_odr void @__cuda_std_barrier() #0 {
  call void asm sideeffect "bar.sync 0;", "~{memory}"() #2
  ret void
}

define linkonce_odr i32 @__cuda_std_barrier_count(i32 %predicate) #0 {
  %result = call i32 asm sideeffect "{ .reg .pred p; setp.ne.u32 p, $1, 0; bar.red.popc.u32 $0, 0, p; }", "=r,r,~{memory}"(i32 %predicate) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_barrier_and(i32 %predicate) #0 {
  %result = call i32 asm sideeffect "{ .reg .pred p, q; setp.ne.u32 p, $1, 0; bar.red.and.pred q, 0, p; selp.u32 $0, 1, 0, q; }", "=r,r,~{memory}"(i32 %predicate) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_barrier_or(i32 %predicate) #0 {
  %result = call i32 asm sideeffect "{ .reg .pred p, q; setp.ne.u32 p, $1, 0; bar.red.or.pred q, 0, p; selp.u32 $0, 1, 0, q; }", "=r,r,~{memory}"(i32 %predicate) #2
  ret i32 %result
}

; Collectives of the warp.

define linkonce_odr i32 @__cuda_std_activemask() #0 {
  %result = call i32 asm sideeffect "activemask.b32 $0;", "=r"() #2
  ret i32 %result
}

define linkonce_odr void @__cuda_std_sync_warp(i32 %mask) #0 {
  call void asm sideeffect "bar.warp.sync $0;", "r,~{memory}"(i32 %mask) #2
  ret void
}

define linkonce_odr i32 @__cuda_std_shuffle_idx(i32 %mask, i32 %value, i32 %lane, i32 %control) #0 {
  %result = call i32 asm sideeffect "shfl.sync.idx.b32 $0, $2, $3, $4, $1;", "=r,r,r,r,r"(i32 %mask, i32 %value, i32 %lane, i32 %control) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_shuffle_xor(i32 %mask, i32 %value, i32 %lane, i32 %control) #0 {
  %result = call i32 asm sideeffect "shfl.sync.bfly.b32 $0, $2, $3, $4, $1;", "=r,r,r,r,r"(i32 %mask, i32 %value, i32 %lane, i32 %control) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_shuffle_up(i32 %mask, i32 %value, i32 %lane, i32 %control) #0 {
  %result = call i32 asm sideeffect "shfl.sync.up.b32 $0, $2, $3, $4, $1;", "=r,r,r,r,r"(i32 %mask, i32 %value, i32 %lane, i32 %control) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_shuffle_down(i32 %mask, i32 %value, i32 %lane, i32 %control) #0 {
  %result = call i32 asm sideeffect "shfl.sync.down.b32 $0, $2, $3, $4, $1;", "=r,r,r,r,r"(i32 %mask, i32 %value, i32 %lane, i32 %control) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_vote_all(i32 %mask, i32 %predicate) #0 {
  %result = call i32 asm sideeffect "{ .reg .pred p, q; setp.ne.u32 p, $2, 0; vote.sync.all.pred q, p, $1; selp.u32 $0, 1, 0, q; }", "=r,r,r"(i32 %mask, i32 %predicate) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_vote_any(i32 %mask, i32 %predicate) #0 {
  %result = call i32 asm sideeffect "{ .reg .pred p, q; setp.ne.u32 p, $2, 0; vote.sync.any.pred q, p, $1; selp.u32 $0, 1, 0, q; }", "=r,r,r"(i32 %mask, i32 %predicate) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_vote_ballot(i32 %mask, i32 %predicate) #0 {
  %result = call i32 asm sideeffect "{ .reg .pred p; setp.ne.u32 p, $2, 0; vote.sync.ballot.b32 $0, p, $1; }", "=r,r,r"(i32 %mask, i32 %predicate) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_match_any_u32(i32 %mask, i32 %value) #0 {
  %result = call i32 asm sideeffect "match.any.sync.b32 $0, $2, $1;", "=r,r,r"(i32 %mask, i32 %value) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_match_all_u32(i32 %mask, i32 %value) #0 {
  %result = call i32 asm sideeffect "{ .reg .pred p; match.all.sync.b32 $0|p, $2, $1; }", "=r,r,r"(i32 %mask, i32 %value) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_match_any_u64(i32 %mask, i64 %value) #0 {
  %result = call i32 asm sideeffect "match.any.sync.b64 $0, $2, $1;", "=r,r,l"(i32 %mask, i64 %value) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_match_all_u64(i32 %mask, i64 %value) #0 {
  %result = call i32 asm sideeffect "{ .reg .pred p; match.all.sync.b64 $0|p, $2, $1; }", "=r,r,l"(i32 %mask, i64 %value) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_reduce_add(i32 %mask, i32 %value) #0 {
  %result = call i32 asm sideeffect "redux.sync.add.u32 $0, $2, $1;", "=r,r,r"(i32 %mask, i32 %value) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_reduce_min(i32 %mask, i32 %value) #0 {
  %result = call i32 asm sideeffect "redux.sync.min.u32 $0, $2, $1;", "=r,r,r"(i32 %mask, i32 %value) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_reduce_max(i32 %mask, i32 %value) #0 {
  %result = call i32 asm sideeffect "redux.sync.max.u32 $0, $2, $1;", "=r,r,r"(i32 %mask, i32 %value) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_reduce_and(i32 %mask, i32 %value) #0 {
  %result = call i32 asm sideeffect "redux.sync.and.b32 $0, $2, $1;", "=r,r,r"(i32 %mask, i32 %value) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_reduce_or(i32 %mask, i32 %value) #0 {
  %result = call i32 asm sideeffect "redux.sync.or.b32 $0, $2, $1;", "=r,r,r"(i32 %mask, i32 %value) #2
  ret i32 %result
}

define linkonce_odr i32 @__cuda_std_reduce_xor(i32 %mask, i32 %value) #0 {
  %result = call i32 asm sideeffect "redux.sync.xor.b32 $0, $2, $1;", "=r,r,r"(i32 %mask, i32 %value) #2
  ret i32 %result
}

; The matrix product of a warp. %sums points to the lane's four sums, which it replaces; once inlined they are registers.

define linkonce_odr void @__cuda_std_mma_m16n8k16_bf16(ptr %sums, i32 %a0, i32 %a1, i32 %a2, i32 %a3, i32 %b0, i32 %b1) #0 {
  %at1 = getelementptr inbounds float, ptr %sums, i64 1
  %at2 = getelementptr inbounds float, ptr %sums, i64 2
  %at3 = getelementptr inbounds float, ptr %sums, i64 3
  %c0 = load float, ptr %sums
  %c1 = load float, ptr %at1
  %c2 = load float, ptr %at2
  %c3 = load float, ptr %at3
  %result = call { float, float, float, float } asm sideeffect "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};", "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"(i32 %a0, i32 %a1, i32 %a2, i32 %a3, i32 %b0, i32 %b1, float %c0, float %c1, float %c2, float %c3) #2
  %d0 = extractvalue { float, float, float, float } %result, 0
  %d1 = extractvalue { float, float, float, float } %result, 1
  %d2 = extractvalue { float, float, float, float } %result, 2
  %d3 = extractvalue { float, float, float, float } %result, 3
  store float %d0, ptr %sums
  store float %d1, ptr %at1
  store float %d2, ptr %at2
  store float %d3, ptr %at3
  ret void
}

; The transpose of an 8 x 8 matrix of 16-bit elements, two a lane.

define linkonce_odr i32 @__cuda_std_transpose_8x8(i32 %pair) #0 {
  %result = call i32 asm sideeffect "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r"(i32 %pair) #2
  ret i32 %result
}

attributes #0 = { alwaysinline convergent nounwind }
attributes #1 = { alwaysinline nounwind memory(none) }
attributes #2 = { convergent nounwind }
