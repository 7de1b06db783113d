; The support IR of cuda_std, linked into every kernel module by cuda_builder. It closes two holes of rustc's NVPTX target:
;
; - shared memory has no Rust spelling: @cuda_std_dynamic_shared is the launch's dynamic block, and its address is cast where LLVM can see
;   the cast, so accesses become ld.shared and st.shared;
; - asm! is not convergent: LLVM may sink or duplicate it across branches, which breaks a collective. Here each collective is a call
;   marked convergent.

target datalayout = "e-p6:32:32-i64:64-i128:128-i256:256-v16:16-v32:32-n16:32:64"
target triple = "nvptx64-nvidia-cuda"

; Aligned as matrices of `wgmma` are.
@cuda_std_dynamic_shared = external addrspace(3) global [0 x i8], align 1024

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

; Matrix products of a warpgroup. %sums points to the thread's sums, as above. %add says whether the product is added to what they hold,
; %rows whether the right side lies by rows of k; both are constants once inlined. What the product reads lies in memory that only the
; descriptors name, so all are barriers to memory accesses.

define linkonce_odr void @__cuda_std_wgmma_fence() #0 {
  call void asm sideeffect "wgmma.fence.sync.aligned;", "~{memory}"() #2
  ret void
}

define linkonce_odr void @__cuda_std_wgmma_commit_group() #0 {
  call void asm sideeffect "wgmma.commit_group.sync.aligned;", "~{memory}"() #2
  ret void
}

define linkonce_odr void @__cuda_std_wgmma_wait_group(i32 %pending) #0 {
  call void asm sideeffect "wgmma.wait_group.sync.aligned $0;", "n,~{memory}"(i32 %pending) #2
  ret void
}

%sums32 = type {
  float, float, float, float, float, float, float, float, float, float, float, float, float, float, float, float, float, float,
  float, float, float, float, float, float, float, float, float, float, float, float, float, float
}

define linkonce_odr void @__cuda_std_wgmma_n64_ss(ptr %sums, i64 %a, i64 %b, i32 %add, i32 %rows) #0 {
  %c = load %sums32, ptr %sums, align 4
  %c0 = extractvalue %sums32 %c, 0  %c1 = extractvalue %sums32 %c, 1  %c2 = extractvalue %sums32 %c, 2
  %c3 = extractvalue %sums32 %c, 3  %c4 = extractvalue %sums32 %c, 4  %c5 = extractvalue %sums32 %c, 5
  %c6 = extractvalue %sums32 %c, 6  %c7 = extractvalue %sums32 %c, 7  %c8 = extractvalue %sums32 %c, 8
  %c9 = extractvalue %sums32 %c, 9  %c10 = extractvalue %sums32 %c, 10  %c11 = extractvalue %sums32 %c, 11
  %c12 = extractvalue %sums32 %c, 12  %c13 = extractvalue %sums32 %c, 13  %c14 = extractvalue %sums32 %c, 14
  %c15 = extractvalue %sums32 %c, 15  %c16 = extractvalue %sums32 %c, 16  %c17 = extractvalue %sums32 %c, 17
  %c18 = extractvalue %sums32 %c, 18  %c19 = extractvalue %sums32 %c, 19  %c20 = extractvalue %sums32 %c, 20
  %c21 = extractvalue %sums32 %c, 21  %c22 = extractvalue %sums32 %c, 22  %c23 = extractvalue %sums32 %c, 23
  %c24 = extractvalue %sums32 %c, 24  %c25 = extractvalue %sums32 %c, 25  %c26 = extractvalue %sums32 %c, 26
  %c27 = extractvalue %sums32 %c, 27  %c28 = extractvalue %sums32 %c, 28  %c29 = extractvalue %sums32 %c, 29
  %c30 = extractvalue %sums32 %c, 30  %c31 = extractvalue %sums32 %c, 31
  %d = call %sums32 asm sideeffect
    "{ .reg .pred p; setp.ne.u32 p, $34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {$0, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24, $25, $26, $27, $28, $29, $30, $31}, $32, $33, p, 1, 1, 0, $35; }",
    "=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,l,l,n,n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,~{memory}"(
    i64 %a, i64 %b, i32 %add, i32 %rows, float %c0, float %c1, float %c2, float %c3, float %c4, float %c5, float %c6, float %c7,
    float %c8, float %c9, float %c10, float %c11, float %c12, float %c13, float %c14, float %c15, float %c16, float %c17, float %c18,
    float %c19, float %c20, float %c21, float %c22, float %c23, float %c24, float %c25, float %c26, float %c27, float %c28, float %c29,
    float %c30, float %c31) #2
  store %sums32 %d, ptr %sums, align 4
  ret void
}

define linkonce_odr void @__cuda_std_wgmma_n64_rs(ptr %sums, i32 %a0, i32 %a1, i32 %a2, i32 %a3, i64 %b, i32 %add, i32 %rows) #0 {
  %c = load %sums32, ptr %sums, align 4
  %c0 = extractvalue %sums32 %c, 0  %c1 = extractvalue %sums32 %c, 1  %c2 = extractvalue %sums32 %c, 2
  %c3 = extractvalue %sums32 %c, 3  %c4 = extractvalue %sums32 %c, 4  %c5 = extractvalue %sums32 %c, 5
  %c6 = extractvalue %sums32 %c, 6  %c7 = extractvalue %sums32 %c, 7  %c8 = extractvalue %sums32 %c, 8
  %c9 = extractvalue %sums32 %c, 9  %c10 = extractvalue %sums32 %c, 10  %c11 = extractvalue %sums32 %c, 11
  %c12 = extractvalue %sums32 %c, 12  %c13 = extractvalue %sums32 %c, 13  %c14 = extractvalue %sums32 %c, 14
  %c15 = extractvalue %sums32 %c, 15  %c16 = extractvalue %sums32 %c, 16  %c17 = extractvalue %sums32 %c, 17
  %c18 = extractvalue %sums32 %c, 18  %c19 = extractvalue %sums32 %c, 19  %c20 = extractvalue %sums32 %c, 20
  %c21 = extractvalue %sums32 %c, 21  %c22 = extractvalue %sums32 %c, 22  %c23 = extractvalue %sums32 %c, 23
  %c24 = extractvalue %sums32 %c, 24  %c25 = extractvalue %sums32 %c, 25  %c26 = extractvalue %sums32 %c, 26
  %c27 = extractvalue %sums32 %c, 27  %c28 = extractvalue %sums32 %c, 28  %c29 = extractvalue %sums32 %c, 29
  %c30 = extractvalue %sums32 %c, 30  %c31 = extractvalue %sums32 %c, 31
  %d = call %sums32 asm sideeffect
    "{ .reg .pred p; setp.ne.u32 p, $37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {$0, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24, $25, $26, $27, $28, $29, $30, $31}, {$32, $33, $34, $35}, $36, p, 1, 1, $38; }",
    "=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,r,r,r,r,l,n,n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,~{memory}"(
    i32 %a0, i32 %a1, i32 %a2, i32 %a3, i64 %b, i32 %add, i32 %rows, float %c0, float %c1, float %c2, float %c3, float %c4, float %c5,
    float %c6, float %c7, float %c8, float %c9, float %c10, float %c11, float %c12, float %c13, float %c14, float %c15, float %c16,
    float %c17, float %c18, float %c19, float %c20, float %c21, float %c22, float %c23, float %c24, float %c25, float %c26, float %c27,
    float %c28, float %c29, float %c30, float %c31) #2
  store %sums32 %d, ptr %sums, align 4
  ret void
}

%sums64 = type {
  float, float, float, float, float, float, float, float, float, float, float, float, float, float, float, float, float, float,
  float, float, float, float, float, float, float, float, float, float, float, float, float, float, float, float, float, float,
  float, float, float, float, float, float, float, float, float, float, float, float, float, float, float, float, float, float,
  float, float, float, float, float, float, float, float, float, float
}

define linkonce_odr void @__cuda_std_wgmma_n128_ss(ptr %sums, i64 %a, i64 %b, i32 %add, i32 %rows) #0 {
  %c = load %sums64, ptr %sums, align 4
  %c0 = extractvalue %sums64 %c, 0  %c1 = extractvalue %sums64 %c, 1  %c2 = extractvalue %sums64 %c, 2
  %c3 = extractvalue %sums64 %c, 3  %c4 = extractvalue %sums64 %c, 4  %c5 = extractvalue %sums64 %c, 5
  %c6 = extractvalue %sums64 %c, 6  %c7 = extractvalue %sums64 %c, 7  %c8 = extractvalue %sums64 %c, 8
  %c9 = extractvalue %sums64 %c, 9  %c10 = extractvalue %sums64 %c, 10  %c11 = extractvalue %sums64 %c, 11
  %c12 = extractvalue %sums64 %c, 12  %c13 = extractvalue %sums64 %c, 13  %c14 = extractvalue %sums64 %c, 14
  %c15 = extractvalue %sums64 %c, 15  %c16 = extractvalue %sums64 %c, 16  %c17 = extractvalue %sums64 %c, 17
  %c18 = extractvalue %sums64 %c, 18  %c19 = extractvalue %sums64 %c, 19  %c20 = extractvalue %sums64 %c, 20
  %c21 = extractvalue %sums64 %c, 21  %c22 = extractvalue %sums64 %c, 22  %c23 = extractvalue %sums64 %c, 23
  %c24 = extractvalue %sums64 %c, 24  %c25 = extractvalue %sums64 %c, 25  %c26 = extractvalue %sums64 %c, 26
  %c27 = extractvalue %sums64 %c, 27  %c28 = extractvalue %sums64 %c, 28  %c29 = extractvalue %sums64 %c, 29
  %c30 = extractvalue %sums64 %c, 30  %c31 = extractvalue %sums64 %c, 31  %c32 = extractvalue %sums64 %c, 32
  %c33 = extractvalue %sums64 %c, 33  %c34 = extractvalue %sums64 %c, 34  %c35 = extractvalue %sums64 %c, 35
  %c36 = extractvalue %sums64 %c, 36  %c37 = extractvalue %sums64 %c, 37  %c38 = extractvalue %sums64 %c, 38
  %c39 = extractvalue %sums64 %c, 39  %c40 = extractvalue %sums64 %c, 40  %c41 = extractvalue %sums64 %c, 41
  %c42 = extractvalue %sums64 %c, 42  %c43 = extractvalue %sums64 %c, 43  %c44 = extractvalue %sums64 %c, 44
  %c45 = extractvalue %sums64 %c, 45  %c46 = extractvalue %sums64 %c, 46  %c47 = extractvalue %sums64 %c, 47
  %c48 = extractvalue %sums64 %c, 48  %c49 = extractvalue %sums64 %c, 49  %c50 = extractvalue %sums64 %c, 50
  %c51 = extractvalue %sums64 %c, 51  %c52 = extractvalue %sums64 %c, 52  %c53 = extractvalue %sums64 %c, 53
  %c54 = extractvalue %sums64 %c, 54  %c55 = extractvalue %sums64 %c, 55  %c56 = extractvalue %sums64 %c, 56
  %c57 = extractvalue %sums64 %c, 57  %c58 = extractvalue %sums64 %c, 58  %c59 = extractvalue %sums64 %c, 59
  %c60 = extractvalue %sums64 %c, 60  %c61 = extractvalue %sums64 %c, 61  %c62 = extractvalue %sums64 %c, 62
  %c63 = extractvalue %sums64 %c, 63
  %d = call %sums64 asm sideeffect
    "{ .reg .pred p; setp.ne.u32 p, $66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {$0, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24, $25, $26, $27, $28, $29, $30, $31, $32, $33, $34, $35, $36, $37, $38, $39, $40, $41, $42, $43, $44, $45, $46, $47, $48, $49, $50, $51, $52, $53, $54, $55, $56, $57, $58, $59, $60, $61, $62, $63}, $64, $65, p, 1, 1, 0, $67; }",
    "=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,l,l,n,n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32,33,34,35,36,37,38,39,40,41,42,43,44,45,46,47,48,49,50,51,52,53,54,55,56,57,58,59,60,61,62,63,~{memory}"(
    i64 %a, i64 %b, i32 %add, i32 %rows, float %c0, float %c1, float %c2, float %c3, float %c4, float %c5, float %c6, float %c7,
    float %c8, float %c9, float %c10, float %c11, float %c12, float %c13, float %c14, float %c15, float %c16, float %c17, float %c18,
    float %c19, float %c20, float %c21, float %c22, float %c23, float %c24, float %c25, float %c26, float %c27, float %c28, float %c29,
    float %c30, float %c31, float %c32, float %c33, float %c34, float %c35, float %c36, float %c37, float %c38, float %c39, float %c40,
    float %c41, float %c42, float %c43, float %c44, float %c45, float %c46, float %c47, float %c48, float %c49, float %c50, float %c51,
    float %c52, float %c53, float %c54, float %c55, float %c56, float %c57, float %c58, float %c59, float %c60, float %c61, float %c62,
    float %c63) #2
  store %sums64 %d, ptr %sums, align 4
  ret void
}

define linkonce_odr void @__cuda_std_wgmma_n128_rs(ptr %sums, i32 %a0, i32 %a1, i32 %a2, i32 %a3, i64 %b, i32 %add, i32 %rows) #0 {
  %c = load %sums64, ptr %sums, align 4
  %c0 = extractvalue %sums64 %c, 0  %c1 = extractvalue %sums64 %c, 1  %c2 = extractvalue %sums64 %c, 2
  %c3 = extractvalue %sums64 %c, 3  %c4 = extractvalue %sums64 %c, 4  %c5 = extractvalue %sums64 %c, 5
  %c6 = extractvalue %sums64 %c, 6  %c7 = extractvalue %sums64 %c, 7  %c8 = extractvalue %sums64 %c, 8
  %c9 = extractvalue %sums64 %c, 9  %c10 = extractvalue %sums64 %c, 10  %c11 = extractvalue %sums64 %c, 11
  %c12 = extractvalue %sums64 %c, 12  %c13 = extractvalue %sums64 %c, 13  %c14 = extractvalue %sums64 %c, 14
  %c15 = extractvalue %sums64 %c, 15  %c16 = extractvalue %sums64 %c, 16  %c17 = extractvalue %sums64 %c, 17
  %c18 = extractvalue %sums64 %c, 18  %c19 = extractvalue %sums64 %c, 19  %c20 = extractvalue %sums64 %c, 20
  %c21 = extractvalue %sums64 %c, 21  %c22 = extractvalue %sums64 %c, 22  %c23 = extractvalue %sums64 %c, 23
  %c24 = extractvalue %sums64 %c, 24  %c25 = extractvalue %sums64 %c, 25  %c26 = extractvalue %sums64 %c, 26
  %c27 = extractvalue %sums64 %c, 27  %c28 = extractvalue %sums64 %c, 28  %c29 = extractvalue %sums64 %c, 29
  %c30 = extractvalue %sums64 %c, 30  %c31 = extractvalue %sums64 %c, 31  %c32 = extractvalue %sums64 %c, 32
  %c33 = extractvalue %sums64 %c, 33  %c34 = extractvalue %sums64 %c, 34  %c35 = extractvalue %sums64 %c, 35
  %c36 = extractvalue %sums64 %c, 36  %c37 = extractvalue %sums64 %c, 37  %c38 = extractvalue %sums64 %c, 38
  %c39 = extractvalue %sums64 %c, 39  %c40 = extractvalue %sums64 %c, 40  %c41 = extractvalue %sums64 %c, 41
  %c42 = extractvalue %sums64 %c, 42  %c43 = extractvalue %sums64 %c, 43  %c44 = extractvalue %sums64 %c, 44
  %c45 = extractvalue %sums64 %c, 45  %c46 = extractvalue %sums64 %c, 46  %c47 = extractvalue %sums64 %c, 47
  %c48 = extractvalue %sums64 %c, 48  %c49 = extractvalue %sums64 %c, 49  %c50 = extractvalue %sums64 %c, 50
  %c51 = extractvalue %sums64 %c, 51  %c52 = extractvalue %sums64 %c, 52  %c53 = extractvalue %sums64 %c, 53
  %c54 = extractvalue %sums64 %c, 54  %c55 = extractvalue %sums64 %c, 55  %c56 = extractvalue %sums64 %c, 56
  %c57 = extractvalue %sums64 %c, 57  %c58 = extractvalue %sums64 %c, 58  %c59 = extractvalue %sums64 %c, 59
  %c60 = extractvalue %sums64 %c, 60  %c61 = extractvalue %sums64 %c, 61  %c62 = extractvalue %sums64 %c, 62
  %c63 = extractvalue %sums64 %c, 63
  %d = call %sums64 asm sideeffect
    "{ .reg .pred p; setp.ne.u32 p, $69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {$0, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24, $25, $26, $27, $28, $29, $30, $31, $32, $33, $34, $35, $36, $37, $38, $39, $40, $41, $42, $43, $44, $45, $46, $47, $48, $49, $50, $51, $52, $53, $54, $55, $56, $57, $58, $59, $60, $61, $62, $63}, {$64, $65, $66, $67}, $68, p, 1, 1, $70; }",
    "=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,r,r,r,r,l,n,n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31,32,33,34,35,36,37,38,39,40,41,42,43,44,45,46,47,48,49,50,51,52,53,54,55,56,57,58,59,60,61,62,63,~{memory}"(
    i32 %a0, i32 %a1, i32 %a2, i32 %a3, i64 %b, i32 %add, i32 %rows, float %c0, float %c1, float %c2, float %c3, float %c4, float %c5,
    float %c6, float %c7, float %c8, float %c9, float %c10, float %c11, float %c12, float %c13, float %c14, float %c15, float %c16,
    float %c17, float %c18, float %c19, float %c20, float %c21, float %c22, float %c23, float %c24, float %c25, float %c26, float %c27,
    float %c28, float %c29, float %c30, float %c31, float %c32, float %c33, float %c34, float %c35, float %c36, float %c37, float %c38,
    float %c39, float %c40, float %c41, float %c42, float %c43, float %c44, float %c45, float %c46, float %c47, float %c48, float %c49,
    float %c50, float %c51, float %c52, float %c53, float %c54, float %c55, float %c56, float %c57, float %c58, float %c59, float %c60,
    float %c61, float %c62, float %c63) #2
  store %sums64 %d, ptr %sums, align 4
  ret void
}

; Four 8 x 8 matrices from shared memory. %parts points to what the lane gets of each; once inlined they are registers.

define linkonce_odr void @__cuda_std_load_8x8x4(ptr %parts, i32 %row) #0 {
  %result = call { i32, i32, i32, i32 } asm sideeffect "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r,~{memory}"(i32 %row) #2
  %part0 = extractvalue { i32, i32, i32, i32 } %result, 0
  %part1 = extractvalue { i32, i32, i32, i32 } %result, 1
  %part2 = extractvalue { i32, i32, i32, i32 } %result, 2
  %part3 = extractvalue { i32, i32, i32, i32 } %result, 3
  %at1 = getelementptr inbounds i32, ptr %parts, i64 1
  %at2 = getelementptr inbounds i32, ptr %parts, i64 2
  %at3 = getelementptr inbounds i32, ptr %parts, i64 3
  store i32 %part0, ptr %parts
  store i32 %part1, ptr %at1
  store i32 %part2, ptr %at2
  store i32 %part3, ptr %at3
  ret void
}

define linkonce_odr void @__cuda_std_load_transposed_8x8x4(ptr %parts, i32 %row) #0 {
  %result = call { i32, i32, i32, i32 } asm sideeffect "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r,~{memory}"(i32 %row) #2
  %part0 = extractvalue { i32, i32, i32, i32 } %result, 0
  %part1 = extractvalue { i32, i32, i32, i32 } %result, 1
  %part2 = extractvalue { i32, i32, i32, i32 } %result, 2
  %part3 = extractvalue { i32, i32, i32, i32 } %result, 3
  %at1 = getelementptr inbounds i32, ptr %parts, i64 1
  %at2 = getelementptr inbounds i32, ptr %parts, i64 2
  %at3 = getelementptr inbounds i32, ptr %parts, i64 3
  store i32 %part0, ptr %parts
  store i32 %part1, ptr %at1
  store i32 %part2, ptr %at2
  store i32 %part3, ptr %at3
  ret void
}

attributes #0 = { alwaysinline convergent nounwind }
attributes #1 = { alwaysinline nounwind memory(none) }
attributes #2 = { convergent nounwind }
